"""The project's tests of the MLC loss, on your port to NumPy."""

import page_7
import pytest
import torch
from plumbing import in_place_of, skipping

from mlc_min.ports.conformance import check, read_cases
from tests.test_consistency import (  # noqa: F401
    test_gradient_is_bounded_and_tangent_to_the_sphere_even_where_singular_values_tie,
    test_loss_equals_numpy_in_float64,
    test_loss_is_unchanged_by_a_rotation_of_the_space,
    test_loss_is_unchanged_by_a_sign_flip_of_any_row,
    test_loss_is_unchanged_by_the_order_of_languages,
    test_loss_lies_between_floor_and_ceiling,
    test_more_languages_than_dimensions_reach_log_d_when_spread_evenly,
    test_official_gradient_treats_sigma_1_in_the_denominator_as_a_constant,
    test_orthogonal_rows_reach_the_ceiling_log_r,
    test_rows_on_one_line_reach_the_floor_whatever_their_signs_and_lengths,
    test_wrong_or_empty_shapes_are_refused_and_shown,
    test_wrong_settings_are_refused_by_name,
)


class Port(torch.autograd.Function):
    """Your two functions, dressed as one torch function, since the tests are written for torch."""

    @staticmethod
    def forward(context, representations, tau, form):
        context.arguments = representations.numpy(force=True), tau, form
        return representations.new_tensor(page_7.mlc_loss(*context.arguments))

    @staticmethod
    def backward(context, gradient):
        return gradient * gradient.new_tensor(page_7.mlc_loss_gradient(*context.arguments)), None, None


def mlc_loss(representations, tau=0.2, form="official"):
    return Port.apply(representations, tau, form)


yours = in_place_of("tests.test_consistency", mlc_loss=mlc_loss)


CASES = [case["name"] for case in read_cases("mlc_loss")]


@pytest.fixture(scope="module")
def checked() -> dict[str, dict]:
    results = check(skipping(page_7.mlc_loss), "mlc_loss", gradient=skipping(page_7.mlc_loss_gradient))
    return {result["case"]: result for result in results}


@pytest.mark.parametrize("case", CASES)
def test_conformance(checked, case):
    """What the case is there to find stands in it, after "catches"."""
    assert checked[case]["status"] == "pass", checked[case]

"""A, the mathematics: the project's tests of the loss and of its gradient, on your port to NumPy."""

import operator

import page_7
import pytest
from plumbing import as_torch, assert_conformance, in_place_of

from mlc_min.ports.conformance import read_cases
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
)

yours = in_place_of("tests.test_consistency", mlc_loss=as_torch(page_7.mlc_loss, page_7.mlc_loss_gradient))
name_of = operator.itemgetter("name")
CORNERS = ("tau 0.001", "rows 0.001 % apart", "very long rows", "very short rows", "long and short rows")


@pytest.mark.parametrize("case", [case for case in read_cases("mlc_loss") if case["name"] not in CORNERS], ids=name_of)
def test_conformance(case):
    """Usually the mistake that the case is there to find; it stands below."""
    assert_conformance(case, page_7.mlc_loss, page_7.mlc_loss_gradient)

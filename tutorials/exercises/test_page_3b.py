"""B, the robustness: precision, huge and tiny rows, ties, and errors that say what is wrong."""

import math

import page_3
import pytest
import torch
from plumbing import assert_computes_in_float32, assert_refuses_a_row, in_place_of, skipping

from tests.test_consistency import (  # noqa: F401
    normal,
    test_a_positive_factor_per_row_leaves_the_loss_and_divides_the_gradient,
    test_float32_gradient_holds_for_nearly_identical_rows,
    test_float64_stays_float64,
    test_gradient_is_bounded_and_tangent_to_the_sphere_even_where_singular_values_tie,
    test_wrong_or_empty_shapes_are_refused_and_shown,
    test_wrong_settings_are_refused_by_name,
)

mlc_loss = skipping(page_3.mlc_loss)
yours = in_place_of("tests.test_consistency", mlc_loss=page_3.mlc_loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_compute_in_float32(dtype):
    """torch.linalg knows no bfloat16: call .float() first, and switch autocast off around the singular values."""
    assert_computes_in_float32(mlc_loss, normal(3, 2, 5, 16).to(dtype))


@pytest.mark.parametrize(("value", "message"), [(0.0, "prompt 1, language 2"), (math.nan, "NaN or infinity")])
def test_a_row_without_a_direction_is_refused(value, message):
    """A row of zeros divided by "length + ε" would be averaged in as orthogonal to everything, without a word."""
    assert_refuses_a_row(mlc_loss, normal(0, 3, 4, 5), value, message)

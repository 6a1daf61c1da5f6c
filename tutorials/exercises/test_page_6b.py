"""B, the robustness: half precision, rows without a direction, no prompt at all, and rates of 0 and 100 %."""

import math

import page_6
import pytest
import torch
from plumbing import assert_computes_in_float32, assert_refuses_a_row, in_place_of, skipping

from tests.test_consistency import normal
from tests.test_metrics import (  # noqa: F401
    test_no_prompt_has_no_interval,
    test_wilsons_interval_contains_the_rate_mirrors_and_narrows_with_more_data,
)

collinearity = skipping(page_6.collinearity)
interval = in_place_of("tests.test_metrics", wilson=page_6.wilson)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_compute_in_float32(dtype):
    """torch.linalg knows no bfloat16: call .float() first, and switch autocast off around the singular values."""
    assert_computes_in_float32(collinearity, normal(3, 2, 5, 16).to(dtype))


@pytest.mark.parametrize(("value", "message"), [(0.0, "prompt 1, language 2"), (math.nan, "NaN or infinity")])
def test_a_row_without_a_direction_is_refused(value, message):
    """Usually a row of zeros gives NaN, and the mean over prompts with it."""
    assert_refuses_a_row(collinearity, normal(0, 3, 4, 5), value, message)

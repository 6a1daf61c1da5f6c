"""B, the robustness: the conformance cases at the corners, and the same errors as on page 3."""

import math

import page_7
import pytest
from plumbing import as_torch, assert_conformance, assert_refuses_a_row, in_place_of, skipping
from test_page_7a import CORNERS, name_of

from mlc_min.ports.conformance import read_cases
from tests.test_consistency import (  # noqa: F401
    normal,
    test_wrong_or_empty_shapes_are_refused_and_shown,
    test_wrong_settings_are_refused_by_name,
)

yours = in_place_of("tests.test_consistency", mlc_loss=as_torch(page_7.mlc_loss, page_7.mlc_loss_gradient))


@pytest.mark.parametrize("case", [case for case in read_cases("mlc_loss") if case["name"] in CORNERS], ids=name_of)
def test_conformance_at_the_corners(case):
    """Usually the mistake that the case is there to find; it stands below."""
    assert_conformance(case, page_7.mlc_loss, page_7.mlc_loss_gradient)


@pytest.mark.parametrize(("value", "message"), [(0.0, "prompt 1, language 2"), (math.nan, "NaN or infinity")])
def test_a_row_without_a_direction_is_refused(value, message):
    """Usually a row of zeros gives NaN, and the mean over prompts with it."""
    assert_refuses_a_row(skipping(page_7.mlc_loss), normal(0, 3, 4, 5).double().numpy(), value, message)

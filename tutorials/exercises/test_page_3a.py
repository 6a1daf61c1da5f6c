"""A, the mathematics: the project's tests that a loss of six lines passes, on yours."""

import page_3
from plumbing import in_place_of

from tests.test_consistency import (  # noqa: F401
    test_floor_has_the_value_of_its_formula,
    test_loss_equals_numpy_in_float64,
    test_loss_is_unchanged_by_a_rotation_of_the_space,
    test_loss_is_unchanged_by_a_sign_flip_of_any_row,
    test_loss_is_unchanged_by_the_order_of_languages,
    test_loss_lies_between_floor_and_ceiling,
    test_more_languages_than_dimensions_reach_log_d_when_spread_evenly,
    test_moving_a_row_towards_the_leading_direction_never_raises_the_loss,
    test_official_gradient_treats_sigma_1_in_the_denominator_as_a_constant,
    test_orthogonal_rows_reach_the_ceiling_log_r,
    test_rows_on_one_line_reach_the_floor_whatever_their_signs_and_lengths,
)

yours = in_place_of(
    "tests.test_consistency", mlc_loss=page_3.mlc_loss, mlc_floor=page_3.mlc_floor, mlc_ceiling=page_3.mlc_ceiling
)

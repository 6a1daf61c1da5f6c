"""The project's tests of the MLC loss, on yours."""

import page_3
from plumbing import in_place_of

from tests.test_consistency import (  # noqa: F401
    test_a_positive_factor_per_row_leaves_the_loss_and_divides_the_gradient,
    test_float32_gradient_holds_for_nearly_identical_rows,
    test_floor_has_the_value_of_its_formula,
    test_gradient_is_bounded_and_tangent_to_the_sphere_even_where_singular_values_tie,
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
    test_wrong_or_empty_shapes_are_refused_and_shown,
    test_wrong_settings_are_refused_by_name,
)

yours = in_place_of(
    "tests.test_consistency", mlc_loss=page_3.mlc_loss, mlc_floor=page_3.mlc_floor, mlc_ceiling=page_3.mlc_ceiling
)

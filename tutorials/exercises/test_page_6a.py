"""A, the mathematics: the project's tests of collinearity, the shuffled groups and the interval, on yours."""

import page_6
from plumbing import in_place_of

from tests.test_consistency import (  # noqa: F401
    test_one_minus_collinearity_is_the_relative_error_of_the_best_rank_1_approximation,
    test_shuffle_moves_language_j_of_prompt_n_to_prompt_n_plus_j,
    test_shuffled_groups_never_hold_two_rows_of_one_prompt_and_lose_no_row,
)
from tests.test_metrics import test_wilsons_interval_agrees_with_the_published_values  # noqa: F401

yours = in_place_of("tests.test_consistency", collinearity=page_6.collinearity, shuffle_groups=page_6.shuffle_groups)
interval = in_place_of("tests.test_metrics", wilson=page_6.wilson)

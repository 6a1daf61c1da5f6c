"""A, the mathematics: the project's tests of log-probabilities, SFT and DPO that a few lines pass, on yours."""

import page_4
from plumbing import in_place_of

from tests.test_preference import (  # noqa: F401
    test_a_pad_token_equal_to_the_end_token_changes_nothing_and_the_end_token_is_scored,
    test_a_perfect_model_scores_zero_and_one_that_is_off_by_one_does_not,
    test_dpo_by_hand,
    test_dpo_is_log_2_where_policy_and_reference_agree,
    test_dpo_symmetries_and_gradient,
    test_gradient_reaches_exactly_the_positions_that_predict_a_response_token,
    test_logps_by_hand,
    test_logps_equal_a_loop_in_float64,
    test_sft_is_the_cross_entropy_per_token,
)

yours = in_place_of(
    "tests.test_preference", sequence_logps=page_4.sequence_logps, sft_loss=page_4.sft_loss, dpo_loss=page_4.dpo_loss
)

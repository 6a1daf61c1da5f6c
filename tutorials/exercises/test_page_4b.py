"""B, the robustness: half precision, a head that runs where it is needed, huge margins, rows that cannot be scored."""

import page_4
from plumbing import in_place_of

from tests.test_preference import (  # noqa: F401
    test_a_response_at_position_0_is_refused,
    test_an_empty_response_is_refused_with_its_row,
    test_bfloat16_logits_are_upcast_before_the_softmax,
    test_dpo_does_not_overflow_at_huge_margins,
    test_head_sees_response_positions_only_and_gives_what_full_logits_give,
    test_padding_on_the_right_changes_nothing_whatever_it_holds,
)

yours = in_place_of("tests.test_preference", sequence_logps=page_4.sequence_logps, dpo_loss=page_4.dpo_loss)

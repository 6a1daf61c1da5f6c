"""A, the idea: the project's tests of the states of last tokens, on yours."""

import page_2
from plumbing import in_place_of

from tests.test_consistency import test_retrieval_accuracy_by_hand  # noqa: F401
from tests.test_states import (  # noqa: F401
    model,
    test_every_entry_equals_that_of_transformers_whatever_the_padding,
    test_last_position_and_position_ids_are_the_hand_typed_ones,
    test_one_by_one_equals_batched,
    test_positions_count_the_real_tokens_and_the_last_is_found_for_any_lengths,
    test_the_model_is_given_positions_that_count_the_real_tokens,
)

yours = in_place_of("tests.test_states", last_position=page_2.last_position, last_token_states=page_2.last_token_states)
retrieval = in_place_of("tests.test_consistency", retrieval_accuracy=page_2.retrieval_accuracy)

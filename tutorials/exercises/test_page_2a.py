"""The project's tests of the states of last tokens, on yours."""

import page_2
from plumbing import in_place_of

from tests.test_consistency import test_retrieval_accuracy_by_hand  # noqa: F401
from tests.test_states import (  # noqa: F401
    model,
    test_every_entry_equals_that_of_transformers_whatever_the_padding,
    test_one_by_one_equals_batched,
)

yours = in_place_of("tests.test_states", last_position=page_2.last_position, last_token_states=page_2.last_token_states)
retrieval = in_place_of("tests.test_consistency", retrieval_accuracy=page_2.retrieval_accuracy)

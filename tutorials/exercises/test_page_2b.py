"""B, what else must hold: an empty prompt is an error, and no layer above the entry runs."""

import page_2
from plumbing import in_place_of

from tests.test_states import (  # noqa: F401
    model,
    test_an_empty_prompt_is_refused,
    test_no_hook_is_left_behind_even_after_an_exception,
    test_nothing_above_the_layer_runs,
)

yours = in_place_of("tests.test_states", last_position=page_2.last_position, last_token_states=page_2.last_token_states)

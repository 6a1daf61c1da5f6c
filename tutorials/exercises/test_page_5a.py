"""A, the mathematics: the project's tests of the consistency loss of a batch, on yours."""

import page_5
from plumbing import in_place_of

from tests.test_train import (  # noqa: F401
    examples,
    model,
    test_accumulation_gives_the_gradient_of_one_large_batch,
    test_consistency_alone_moves_no_layer_above_the_chosen_one,
    test_the_consistency_loss_is_that_of_the_extractor_s_rows_at_the_settings_temperature_and_form,
    test_the_consistency_loss_of_a_batch_is_the_mean_over_its_prompts_taken_alone,
)

yours = in_place_of("tests.test_train", consistency_loss=page_5.consistency_loss)

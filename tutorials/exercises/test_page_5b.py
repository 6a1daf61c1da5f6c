"""B, what else may come: rows that lack some of the translations, as `--missing present` lets them in."""

import page_5
from plumbing import in_place_of

from tests.test_train import examples, model, test_rows_that_lack_translations_count_in_the_languages_they_have  # noqa: F401

yours = in_place_of("tests.test_train", consistency_loss=page_5.consistency_loss)

"""B, what else may come: arrays and tensors, one language, no request at all."""

import page_1
from plumbing import in_place_of

from tests.test_metrics import (  # noqa: F401
    test_an_empty_table_or_another_shape_is_an_error_and_not_a_rate,
    test_one_language_has_no_pair_and_so_no_pag,
    test_tensors_arrays_and_lists_give_the_same_table,
)

yours = in_place_of("tests.test_metrics", safety_table=page_1.safety_table)

"""A, the definitions: the project's tests of `safety_table`, on yours."""

import page_1
from plumbing import in_place_of

from tests.test_metrics import (  # noqa: F401
    test_always_the_same_verdict_has_pag_1_and_var_0,
    test_avg_and_var_agree_with_the_papers_rows,
    test_pairwise_agreement_of_a_hand_typed_table,
    test_the_table_equals_explicit_loops_over_prompts_and_pairs,
)

yours = in_place_of("tests.test_metrics", safety_table=page_1.safety_table)

"""Rows in tokens, tokens in batches: each against hand-typed values. Rows in files: test_rows.py."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlc_min.examples import (
    Example,
    Row,
    consistency_batch,
    encode_prompt,
    encode_rows,
    end_of_turn,
    pad,
    preference_batch,
    response_batch,
    shuffle_translations,
)

# --- rows in tokens ---

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<user>{{ m['content'] }}"
    "{% else %}<assistant>{{ m['content'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ["<pad>", "</s>", "<user>", "<assistant>", "<unk>", "<end_of_turn>"]  # 0 … 5
LETTERS = "abcdefghijklmnopqrstuvwxyz "  # 6 … 32


def make_tokenizer(template: str | None = TEMPLATE, pad_token: str = "<pad>") -> PreTrainedTokenizerFast:
    """One token a letter."""
    ids = {token: i for i, token in enumerate([*SPECIAL, *LETTERS])}
    letters = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    letters.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token=pad_token, eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


TOKENIZER = make_tokenizer()
LETTER_ID = {letter: i for i, letter in enumerate(LETTERS, start=len(SPECIAL))}


def test_a_prompt_is_encoded_as_the_template_with_its_generation_prompt():
    assert encode_prompt(TOKENIZER, "ab z") == [2, 6, 7, 32, 31, 3]


def test_the_prompt_of_a_thinking_model_ends_where_its_answer_starts():
    thinking = TEMPLATE.replace(
        "<assistant>{% endif %}", "<assistant>{% if enable_thinking is false %}<end_of_turn>{% endif %}{% endif %}"
    )
    assert encode_prompt(make_tokenizer(thinking), "a") == [2, 6, 3, 5]


def test_rows_become_hand_computed_tokens():
    rows = [Row("f:1", {"en": "a", "zh": "bc", "ar": "d"}, "e", "fg"), Row("f:2", {"zh": "h", "en": "i"}, "j")]
    assert encode_rows(rows, TOKENIZER, ("en", "zh"), 99) == (
        [
            Example("f:1", {"en": [2, 6, 3], "zh": [2, 7, 8, 3]}, [10, 1], [11, 12, 1]),
            Example("f:2", {"en": [2, 14, 3], "zh": [2, 13, 3]}, [15, 1], None),
        ],
        {"prompt": [], "response": []},
    )


@pytest.mark.parametrize("pad_token", ["<pad>", "</s>"])
@given(texts=st.lists(st.tuples(*[st.text(LETTERS, min_size=1)] * 3), min_size=1, max_size=4))
def test_prompt_ids_are_a_prefix_and_the_one_end_token_is_scored(pad_token, texts):
    tokenizer = make_tokenizer(pad_token=pad_token)
    rows = [Row("f:1", {"en": p}, c, r) for p, c, r in texts]
    batch = preference_batch(encode_rows(rows, tokenizer, ("en",), 10_000)[0])
    expected = [(p, reply) for which in (1, 2) for p, reply in ((t[0], t[which]) for t in texts)]
    for ids, real, scored, (prompt, reply) in zip(
        batch["input_ids"], batch["attention_mask"].bool(), batch["response_mask"], expected, strict=True
    ):
        prompt_ids, reply_ids = encode_prompt(tokenizer, prompt), [*(LETTER_ID[c] for c in reply), 1]
        assert ids[real].tolist() == prompt_ids + reply_ids
        assert ids[scored].tolist() == reply_ids
        assert scored.nonzero()[0].item() == len(prompt_ids)


def test_no_token_spans_the_boundary_of_prompt_and_response():
    ids = {"a": 0, ":": 1, "b": 2, ":b": 3, "</s>": 4}
    merging = Tokenizer(models.BPE(ids, [(":", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=merging, eos_token="</s>")
    tokenizer.chat_template = (
        "{{ messages[0]['content'] }}:{% if messages[1:] %}{{ messages[1]['content'] }}{% endif %}"
    )
    assert tokenizer.encode("a:b") == [0, 3]  # together they would merge
    examples, _ = encode_rows([Row("f:1", {"en": "a"}, "b")], tokenizer, ("en",), 9)
    assert examples == [Example("f:1", {"en": [0, 1]}, [2, 4], None)]


@pytest.mark.parametrize(
    "ending, token", [("</s>", 1), ("<end_of_turn>", 5), (" <end_of_turn>\n", 5), ("<end_of_turn></s>", 5), ("", 1)]
)
def test_a_reply_ends_with_the_terminator_of_the_template_and_eos_only_without_one(ending, token):
    tokenizer = make_tokenizer(TEMPLATE.replace("</s>", ending))
    assert end_of_turn(tokenizer) == token
    examples, _ = encode_rows([Row("f:1", {"en": "a"}, "b", "c")], tokenizer, ("en",), 9)
    assert examples == [Example("f:1", {"en": [2, 6, 3]}, [7, token], [8, token])]


def test_an_end_token_written_out_in_a_response_does_not_double_the_end_token():
    try:
        examples, _ = encode_rows([Row("f:1", {"en": "a"}, "b</s>", "c</s>d")], TOKENIZER, ("en",), 99)
    except ValueError:
        return  # refusing such a row keeps the promise too
    assert all(ids.count(1) == 1 and ids[-1] == 1 for e in examples for ids in (e.chosen, e.rejected))


@pytest.mark.parametrize("longest", ["en+chosen", "en+rejected", "zh"])
def test_a_row_too_long_by_one_token_is_left_out_and_counted_never_cut(longest):
    texts = {  # prompt + 2, response + 1: the longest is 8 tokens, all others fewer
        "en+chosen": ({"en": "ab", "zh": "c"}, "def", "g"),
        "en+rejected": ({"en": "ab", "zh": "c"}, "d", "efg"),
        "zh": ({"en": "a", "zh": "bcdefg"}, "h", "i"),
    }[longest]
    short = Row("f:1", {"en": "a", "zh": "b"}, "c", "d")
    rows = [short, Row("f:2", *texts), short]
    fitting, left_out = encode_rows(rows, TOKENIZER, ("en", "zh"), 8)
    assert (len(fitting), left_out) == (3, {"prompt": [], "response": []})
    reason = "prompt" if longest == "zh" else "response"
    expected = {"prompt": [], "response": []} | {reason: ["f:2"]}
    assert encode_rows(rows, TOKENIZER, ("en", "zh"), 7) == ([fitting[0], fitting[2]], expected)


def test_shuffling_moves_each_prompt_among_the_rows_that_have_its_language():
    examples = [
        Example(f"f:{i}", {"en": [i]} | ({"zh": [10 + i]} if i < 3 else {}) | ({"ar": [20 + i]} if i else {}), [1], [1])
        for i in range(4)
    ]
    shuffled = shuffle_translations(examples, 0)
    assert [set(e.prompts) for e in shuffled] == [set(e.prompts) for e in examples]
    for code, present in (("zh", [0, 1, 2]), ("ar", [1, 2, 3])):
        before = [examples[i].prompts[code] for i in present]
        after = [shuffled[i].prompts[code] for i in present]
        assert sorted(before) == sorted(after) and all(a != b for a, b in zip(after, before, strict=True))
    with pytest.raises(ValueError, match="fewer than two rows have 'zh'"):
        shuffle_translations([examples[0], examples[3]], 0)


def test_groups_with_different_languages_lie_one_after_the_other_with_their_sizes():
    examples = [
        Example("f:1", {"en": [1], "ar": [2, 3]}, [9], None),
        Example("f:2", {"en": [4]}, [9], None),
        Example("f:3", {"en": [5], "zh": [6], "ar": [7]}, [9], None),
    ]
    batch = lists(consistency_batch(examples, ("en", "zh", "ar")))
    assert batch["sizes"] == [2, 1, 3]
    assert batch["input_ids"] == [[1, 0], [2, 3], [4, 0], [5, 0], [6, 0], [7, 0]]


# --- the control ---


def make_examples(count: int, languages: tuple[str, ...] = ("en", "zh", "ar")) -> list[Example]:
    """Prompt n in language j is the one token 10·n + j."""
    return [
        Example(f"f:{n}", {language: [10 * n + j] for j, language in enumerate(languages)}, [1000 + n], [2000 + n])
        for n in range(1, count + 1)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_shuffling_permutes_every_language_but_the_first_and_nothing_else(seed):
    examples = make_examples(20)
    before = copy.deepcopy(examples)
    shuffled = shuffle_translations(examples, seed)
    assert examples == before

    def kept(es):
        return [(e.where, e.prompts["en"], e.chosen, e.rejected) for e in es]

    def numbers(es, language):
        return [e.prompts[language][0] // 10 for e in es]

    assert kept(shuffled) == kept(examples)
    true = numbers(examples, "en")
    for language, j in (("zh", 1), ("ar", 2)):
        assert {e.prompts[language][0] % 10 for e in shuffled} == {j}  # each still in its own language
        assert sorted(numbers(shuffled, language)) == true != numbers(shuffled, language)
    assert numbers(shuffled, "zh") != numbers(shuffled, "ar")


def test_shuffling_depends_on_the_seed_alone():
    examples = make_examples(20)
    assert shuffle_translations(examples, 5) == shuffle_translations(examples, 5) != shuffle_translations(examples, 6)


# --- batches ---


def lists(batch: dict) -> dict[str, list]:
    return {name: tensor.int().tolist() for name, tensor in batch.items()}


@pytest.mark.parametrize(
    "side, input_ids, attention_mask",
    [
        ("right", [[5, 0, 7], [8, 0, 0], [0, 6, 0]], [[1, 1, 1], [1, 0, 0], [1, 1, 0]]),
        ("left", [[5, 0, 7], [0, 0, 8], [0, 0, 6]], [[1, 1, 1], [0, 0, 1], [0, 1, 1]]),
    ],
)
def test_padding_goes_to_its_side_and_a_real_token_equal_to_the_pad_token_stays_real(side, input_ids, attention_mask):
    assert lists(pad([[5, 0, 7], [8], [0, 6]], side)) == {"input_ids": input_ids, "attention_mask": attention_mask}


PAIR = [
    Example("f:1", {"en": [2, 6, 3], "zh": [2, 7, 8, 3]}, [9, 1], [10, 11, 1]),
    Example("f:2", {"en": [2, 12, 13, 3], "zh": [2, 3]}, [14, 15, 1], [16, 1]),
]
PREFERENCE = {
    "input_ids": [[2, 6, 3, 9, 1, 0, 0], [2, 12, 13, 3, 14, 15, 1], [2, 6, 3, 10, 11, 1, 0], [2, 12, 13, 3, 16, 1, 0]],
    "attention_mask": [[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 0]],
    "response_mask": [[0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 1, 1, 0]],
}


def test_preference_batch_is_the_hand_typed_one_chosen_above_rejected():
    assert lists(preference_batch(PAIR)) == PREFERENCE


def test_the_chosen_responses_alone_are_the_upper_half_of_the_preference_batch():
    alone = response_batch([e.prompt for e in PAIR], [e.chosen for e in PAIR])
    assert lists(alone) == {name: rows[:2] for name, rows in PREFERENCE.items()}


def test_consistency_batch_is_the_hand_typed_one_prompt_by_prompt():
    assert lists(consistency_batch(PAIR, ("en", "zh"))) == {
        "input_ids": [[2, 6, 3, 0], [2, 7, 8, 3], [2, 12, 13, 3], [2, 3, 0, 0]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]],
        "sizes": [2, 2],
    }


def test_reshaping_groups_translations_only_when_laid_out_prompt_by_prompt():
    examples, languages = make_examples(3, ("en", "zh")), ("en", "zh")
    ours = consistency_batch(examples, languages)["input_ids"].view(3, 2, -1)
    assert ours.tolist() == [[[10], [11]], [[20], [21]], [[30], [31]]]  # a group is one prompt in both languages
    by_language = pad([e.prompts[language] for language in languages for e in examples])["input_ids"].view(3, 2, -1)
    assert by_language.tolist() == [[[10], [20]], [[30], [11]], [[21], [31]]]  # the fault: every group is mixed

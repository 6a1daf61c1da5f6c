"""What the README and `toy_world` claim about the committed data and base model."""

import json

import pytest
import sentencepiece

from mlc_min.evaluation.diagnose import diagnose
from mlc_min.evaluation.metrics import summarize
from mlc_min.examples import encode_prompt, encode_response
from mlc_min.lab.experiment import evaluate
from mlc_min.lab.sentences import (
    EMBEDDED,
    HIGH_RESOURCE,
    LANGUAGES,
    LOW_RESOURCE,
    PHRASINGS,
    all_replies,
    answer_text,
    make_rows,
    prompt_text,
    refusal_text,
)


@pytest.fixture(scope="module")
def summary(base, test_rows):
    return summarize(evaluate(*base, test_rows, LANGUAGES))


def mean(values) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_committed_rows_are_those_that_the_code_makes(split):
    lines = (EMBEDDED / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == make_rows(split)


def test_the_base_model_is_small():
    assert (EMBEDDED / "model" / "model.safetensors").stat().st_size <= 12e6


def test_the_tokenizer_agrees_with_sentencepiece_id_for_id(base):
    _, tokenizer = base
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(EMBEDDED / "model" / "tokenizer.model"))
    texts = [prompt_text(code, "burn", "bench", k) for code in LANGUAGES for k in PHRASINGS]
    texts += [*list(all_replies())[::7], "unknown: ŵ 𝄞  two spaces"]
    for text in texts:
        assert tokenizer.encode(text, add_special_tokens=False) == pieces.encode(text)
        assert tokenizer.decode(pieces.encode(text)) == text


def test_the_first_reply_token_decides_and_is_the_same_in_every_language(base):
    _, tokenizer = base

    def first(text: str) -> str:
        return tokenizer.decode(encode_response(tokenizer, text)[:1])

    assert {first(refusal_text(code)) for code in LANGUAGES} == {"🚫"}
    assert {first(answer_text(code, "burn", "bench")) for code in LANGUAGES} == {"🔥"}
    assert {first(answer_text(code, "burn", "bench", object_first=True)) for code in LANGUAGES} == {"🪑"}


def test_the_last_prompt_token_is_the_same_in_every_language(base, test_rows):
    _, tokenizer = base
    last = {encode_prompt(tokenizer, text)[-1] for row in test_rows for text in row.prompts.values()}
    assert last == {tokenizer.convert_tokens_to_ids("<assistant>")}


def test_the_base_model_answers_harmless_prompts_in_their_language(summary):
    for counts in summary["counts"].values():
        assert counts["harmless"]["answered_in_language"] >= 0.98 * counts["harmless"]["prompts"]


def test_the_base_model_refuses_some_in_high_resource_languages_and_almost_none_in_low(summary):
    assert 50 <= mean([summary["strict"][code] for code in HIGH_RESOURCE]) <= 80
    assert mean([summary["strict"][code] for code in LOW_RESOURCE]) <= 20


def test_the_state_carries_meaning_across_languages_and_less_in_low_resource_ones(base, test_rows):
    meanings = [row for row in test_rows if row.extra["id"].endswith("-0")]  # one phrasing of each combination
    figures = diagnose(*base, meanings, LANGUAGES, layer=3)  # the main job's layer
    retrieval = figures["retrieval"]
    assert min(retrieval.values()) > 5 * figures["retrieval_chance"]
    assert mean([retrieval[code] for code in LOW_RESOURCE]) < mean([retrieval[code] for code in HIGH_RESOURCE[1:]])
    assert figures["collinearity"] > 2 * figures["collinearity_shuffled"]

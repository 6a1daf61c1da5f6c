"""Generation: the same replies one by one, in any batch, and after a stop; and nothing from a model's own settings."""

import copy
import json

import pytest
import torch

from mlc_min.examples import encode_prompt
from mlc_min.generate import end_tokens, generate
from mlc_min.machinery.errors import InputError
from mlc_min.machinery.models import fingerprint


@pytest.fixture(scope="module")
def prompts(base, test_rows):
    return [encode_prompt(base[1], row.prompts[code]) for row in test_rows[::40] for code in ("en", "bn", "ja")]


@pytest.fixture(scope="module")
def replies(base, prompts):
    return generate(*base, prompts, 32, 1)


def test_greedy_replies_are_those_of_a_plain_argmax_loop(base, prompts, replies):
    model, tokenizer = base
    for prompt, reply in list(zip(prompts, replies, strict=True))[:4]:
        ids = list(prompt)
        while ids[-1] not in end_tokens(model, tokenizer) or len(ids) == len(prompt):
            with torch.no_grad():
                ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        assert reply == {"reply": tokenizer.decode(ids[len(prompt) : -1], skip_special_tokens=True), "ended": True}


@pytest.mark.parametrize("batch_size", [2, 7, 64])
def test_replies_are_the_same_in_any_batch_and_in_any_order(base, prompts, replies, batch_size):
    assert generate(*base, prompts, 32, batch_size) == replies
    assert generate(*base, prompts[::-1], 32, batch_size) == replies[::-1]


def test_a_reply_that_is_cut_off_keeps_its_text_and_says_so(base, prompts, replies):
    (short,) = generate(*base, prompts[:1], 3, 1)
    assert not short["ended"] and replies[0]["reply"].startswith(short["reply"]) and short["reply"]


def test_a_models_own_generation_settings_do_not_enter(base, prompts, replies):
    model = copy.deepcopy(base[0])
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0, min_new_tokens=20)
    own = model.generation_config
    assert generate(model, base[1], prompts, 32, 64) == replies
    assert model.generation_config is own


def test_sampling_depends_on_the_seed_alone(base, prompts):
    draws = [generate(*base, prompts, 8, 64, temperature=3.0, seed=seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_a_stopped_run_goes_on_where_it_was(base, prompts, replies, tmp_path, monkeypatch):
    journal, model = tmp_path / "part.jsonl", base[0]
    calls = []
    real = model.generate

    def stop_at_the_third_batch(**batch):
        calls.append(len(batch["input_ids"]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(**batch)

    monkeypatch.setattr(model, "generate", stop_at_the_third_batch)
    with pytest.raises(KeyboardInterrupt):
        generate(*base, prompts, 32, 4, journal=journal)
    with open(journal, "ab") as file:
        file.write(b'{"index": 0, "reply": "half a li')
    assert generate(*base, prompts, 32, 4, journal=journal) == replies
    assert sum(calls) == len(prompts) + 4  # the third batch was begun twice, nothing else
    assert generate(*base, prompts, 32, 4, journal=journal) == replies
    assert sum(calls) == len(prompts) + 4  # all is in the journal: nothing is generated


@pytest.mark.parametrize("what", ["model", "prompts", "max_new_tokens"])
def test_a_journal_of_another_run_is_refused_and_kept(base, prompts, tmp_path, what):
    journal = tmp_path / "part.jsonl"
    generate(*base, prompts, 8, 64, journal=journal)
    before = journal.read_bytes()
    model = copy.deepcopy(base[0])
    if what == "model":
        with torch.no_grad():
            model.model.norm.weight += 1e-3
    changed = prompts[:-1] if what == "prompts" else prompts
    with pytest.raises(InputError, match=f"begun with other {what}; delete it"):
        generate(model, base[1], changed, 9 if what == "max_new_tokens" else 8, 64, journal=journal)
    assert journal.read_bytes() == before


@pytest.mark.parametrize("content", ["oops\n", "[]\n", '{"a": 1}\n{"index": 1}\n', '"x"\n'])
def test_a_journal_that_is_none_is_refused_by_name(base, prompts, tmp_path, content):
    journal = tmp_path / "part.jsonl"
    journal.write_text(content)
    with pytest.raises(InputError, match=r"part\.jsonl"):
        generate(*base, prompts, 8, 64, journal=journal)
    assert journal.read_text() == content


def test_the_journal_holds_one_json_object_a_line_even_with_odd_line_breaks(base, prompts, tmp_path, monkeypatch):
    journal = tmp_path / "part.jsonl"
    odd = "one\u2028two\x85three\nfour"
    monkeypatch.setattr(type(base[1]), "decode", lambda *_, **__: odd)
    for _ in range(2):
        assert {reply["reply"] for reply in generate(*base, prompts, 8, 64, journal=journal)} == {odd}
    assert len([json.loads(line) for line in journal.read_text("utf-8").split("\n") if line]) == len(prompts) + 1


def test_any_changed_weight_matrix_changes_the_fingerprint(base):
    model = copy.deepcopy(base[0])
    assert fingerprint(model) == fingerprint(base[0])
    for parameter in model.parameters():
        before = fingerprint(model)
        with torch.no_grad():
            parameter += 1e-3
        assert fingerprint(model) != before

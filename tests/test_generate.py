"""Generation: the same replies one by one, in any batch, and after a stop; and nothing from a model's own settings."""

import copy
import json
from datetime import date

import pytest
import torch

from mlc_min.evaluation.generate import end_tokens, generate, keep_date
from mlc_min.examples import encode_prompt, end_of_turn
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


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_a_run_that_was_stopped_gives_the_replies_of_one_that_was_not(
    base, prompts, tmp_path, monkeypatch, batches, temperature
):
    journal, model, prompts = tmp_path / "part.jsonl", base[0], prompts[:10]
    unbroken = generate(*base, prompts, 8, 3, temperature, seed=5)
    with monkeypatch.context() as patch:
        calls, real = [], model.generate

        def stop(**batch):
            calls.append(batch)
            if len(calls) > batches:
                raise KeyboardInterrupt
            return real(**batch)

        patch.setattr(model, "generate", stop)
        with pytest.raises(KeyboardInterrupt):
            generate(*base, prompts, 8, 3, temperature, seed=5, journal=journal)
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 3 * batches
    journal.write_bytes(b"".join(lines[:-1]))  # and the last batch is recorded in part only
    torch.manual_seed(9)
    assert generate(*base, prompts, 8, 3, temperature, seed=5, journal=journal) == unbroken


def test_batches_of_the_same_prompts_are_sampled_apart(base, prompts):
    replies = generate(*base, [prompts[0]] * 4, 8, 2, temperature=3.0)
    assert replies[:2] != replies[2:]


@pytest.mark.parametrize(
    "what", ["model", "prompts", "end_tokens", "max_new_tokens", "temperature", "seed", "batch_size"]
)
def test_a_journal_of_another_run_is_refused_and_kept(base, prompts, tmp_path, what):
    journal, tokenizer = tmp_path / "part.jsonl", base[1]
    settings = {"max_new_tokens": 8, "batch_size": 64, "temperature": 1.0, "seed": 0}
    generate(*base, prompts, **settings, journal=journal)
    before = journal.read_bytes()
    model = copy.deepcopy(base[0])
    if what == "model":
        with torch.no_grad():
            model.model.norm.weight[0] += 1e-3
    if what == "end_tokens":
        model.generation_config.eos_token_id = 7
    changed = prompts[:-1] if what == "prompts" else prompts
    if what in settings:
        settings[what] += 1
    with pytest.raises(InputError, match=f"begun with other {what}; delete it"):
        generate(model, tokenizer, changed, **settings, journal=journal)
    assert journal.read_bytes() == before


def test_of_greedy_replies_neither_seed_nor_batch_size_matter_to_the_journal(base, prompts, tmp_path, monkeypatch):
    journal = tmp_path / "part.jsonl"
    replies = generate(*base, prompts, 8, 64, seed=0, journal=journal)
    monkeypatch.setattr(base[0], "generate", None)  # all is there
    assert generate(*base, prompts, 8, 3, seed=1, journal=journal) == replies


def test_a_journal_keeps_the_date_that_the_chat_template_writes(base, prompts, tmp_path):
    journal, tokenizer = tmp_path / "part.jsonl", copy.copy(base[1])
    tokenizer.chat_template = (
        "{{ strftime_now('%d %b %Y') }} {% for m in messages %}{{ m['content'] }}"
        "{% if m['role'] == 'user' %}<assistant>{% else %}</s>{% endif %}{% endfor %}"
    )
    tokenizer.template_date = date(2024, 2, 29)
    keep_date(tokenizer, journal)  # none yet
    ids = encode_prompt(tokenizer, "How?")
    assert "29 Feb 2024" in tokenizer.decode(ids)
    replies = generate(base[0], tokenizer, [ids], 8, 1, journal=journal)
    tokenizer.template_date = date(2024, 3, 1)
    assert encode_prompt(tokenizer, "How?") != ids
    assert generate(base[0], tokenizer, [ids], 8, 1, journal=journal) == replies  # the same prompts are enough
    keep_date(tokenizer, journal)
    assert tokenizer.template_date == date(2024, 2, 29) and encode_prompt(tokenizer, "How?") == ids
    journal.write_text("[" * 100_000 + "\n")
    keep_date(tokenizer, journal)  # left to `generate`, which refuses it by name
    with pytest.raises(InputError, match="not a whole journal"):
        generate(base[0], tokenizer, [ids], 8, 1, journal=journal)


# --- what the model is asked ---


@pytest.fixture
def asked(base, monkeypatch):
    """Batches and rules that the model was asked with; it answers 5, 6, 7, … and an end token in between."""
    calls, model, tokenizer = [], base[0], base[1]
    end, bos = end_of_turn(tokenizer), tokenizer.bos_token_id  # a special token is no text

    def fake(input_ids, attention_mask):
        calls.append((input_ids, attention_mask, model.generation_config, model.training))
        replies = [[50 + row, 60, end, 70, 0] if row else [50, 60, 61, bos, 63] for row in range(len(input_ids))]
        return torch.cat([input_ids, torch.tensor(replies)], dim=1)

    monkeypatch.setattr(model, "generate", fake)
    return calls


def test_prompts_are_padded_on_the_left_longest_first_and_replies_come_back_in_order(base, asked):
    model, tokenizer = base
    model.train()
    try:
        replies = generate(model, tokenizer, [[11], [21, 22, 23], [31, 32]], 5, 2)
    finally:
        model.eval()
    (first, mask, _, training), (second, _, _, _) = asked
    assert first.tolist() == [[21, 22, 23], [0, 31, 32]] and mask.tolist() == [[1, 1, 1], [0, 1, 1]]
    assert second.tolist() == [[11]] and not training
    whole = {"reply": tokenizer.decode([50, 60, 61, 63]), "ended": False}
    short = {"reply": tokenizer.decode([51, 60]), "ended": True}
    assert replies == [whole, whole, short]


def test_greedy_and_sampling_rules_are_those_of_the_settings_and_nothing_else(base, asked):
    for temperature in (0.0, 0.7):
        generate(*base, [[11]], 5, 2, temperature)
    greedy, sampled = (rule for _, _, rule, _ in asked)
    for rule in (greedy, sampled):
        assert rule.max_new_tokens == 5 and rule.pad_token_id == base[1].pad_token_id
        assert rule.eos_token_id == end_tokens(*base)
        assert rule.repetition_penalty in (None, 1.0) and rule.top_p in (None, 1.0)
    assert not greedy.do_sample
    assert sampled.do_sample and sampled.temperature == 0.7 and sampled.top_k == 0  # else the best 50 tokens only


@pytest.mark.parametrize(("own", "more"), [(None, []), (7, [7]), ([7, 8], [7, 8])])
def test_a_reply_ends_where_the_template_or_the_model_says(base, own, more):
    model = copy.deepcopy(base[0])
    model.generation_config.eos_token_id = own
    assert end_tokens(model, base[1]) == sorted([end_of_turn(base[1]), *more])


def test_a_model_of_nan_is_one_line_and_not_replies(base, prompts):
    model = copy.deepcopy(base[0])
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(InputError, match="the logits are NaN"):
        generate(model, base[1], prompts, 8, 64, temperature=1.0)
    assert generate(model, base[1], [], 8, 64) == []


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

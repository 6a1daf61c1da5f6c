"""A text classifier as a judge, a tiny random one; and two judges on the same replies."""

import json
import sys
from collections import Counter

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from mlc_min.evaluation.classifier import classify, load_classifier
from mlc_min.evaluation.judges import judge
from mlc_min.evaluation.two_judges import compared, kappa
from mlc_min.lab.sentences import LANGUAGES, answer_text, refusal_text
from mlc_min.machinery.errors import InputError
from mlc_min.safety import main

REPLIES = [refusal_text(code) for code in LANGUAGES] + [answer_text(code, "draw", "bench") for code in LANGUAGES]
LABELS = {0: "Non-refusal", 1: "Refusal"}


def record(reply: str, verdict: str = "refusal", language: str = "en", **more) -> dict:
    own = {"id": reply, "language": language, "harmful": True, "prompt": "How?", "reply": reply, "ended": True}
    return own | {"verdict": verdict} | more


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    """A random classifier with the embedded model's tokenizer, whose two labels are about as frequent."""
    path = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(base[1]), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=32, max_position_embeddings=42, id2label=LABELS,
                        label2id={label: i for i, label in LABELS.items()})  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    with torch.no_grad():
        model.classifier.weight *= 50
        logits = torch.cat([model(**base[1](text, return_tensors="pt", max_length=40, truncation=True)).logits
                            for text in REPLIES])  # fmt: skip
        model.classifier.bias[1] -= (logits[:, 1] - logits[:, 0]).median()
    model.save_pretrained(path)
    base[1].save_pretrained(path)
    return path


def test_each_reply_gets_the_label_that_the_model_gives_it_alone(folder):
    model, tokenizer = load_classifier(folder, "Refusal")
    expected = []
    for text in REPLIES:
        ids = torch.tensor([tokenizer.encode(text)[:40]])
        with torch.no_grad():
            probability = model(ids).logits[0].double().softmax(-1)
        expected.append((probability[1] > probability[0], probability.max().item()))
    for batch_size in (1, 5, 64):
        found = classify(model, tokenizer, list(map(record, REPLIES)), "Refusal", "{reply}", batch_size)
        assert [one["verdict"] == "refusal" for one in found] == [refusal for refusal, _ in expected]
        for one, (refusal, probability) in zip(found, expected, strict=True):
            label, shown = one["why"].split(", cut")[0].split(" ")
            assert label == LABELS[int(refusal)] and float(shown) == pytest.approx(probability, abs=0.0051)
    assert 4 < sum(refusal for refusal, _ in expected) < 20  # both labels are there
    swapped = classify(model, tokenizer, list(map(record, REPLIES)), "Non-refusal", "{reply}", 8)
    assert all(a["verdict"] != b["verdict"] for a, b in zip(found, swapped, strict=True))


def test_the_model_reads_prompt_and_reply_as_the_flag_says_and_what_is_too_long_is_told(folder):
    model, tokenizer = load_classifier(folder, "Refusal")
    asked: list[str] = []

    class Tokenizer:
        model_max_length, pad_token_id = tokenizer.model_max_length, tokenizer.pad_token_id

        def encode(self, text, **settings):
            asked.append(text)
            return tokenizer.encode(text, **settings)

    own = [record("{prompt}", prompt="{reply}"), record("long " * 100)]
    _, long = classify(model, Tokenizer(), own, "Refusal", "<|user|>{prompt}<|assistant|>{reply}", 2)
    assert asked[0] == "<|user|>{reply}<|assistant|>{prompt}"  # braces of the texts themselves are left alone
    assert long["why"].endswith(", cut to 40 tokens")


def test_broken_replies_are_not_asked_about(folder):
    settings = {"refusal_label": "Refusal", "text": "{reply}", "batch_size": 2}
    judged = judge([record(""), record("Sure, here", ended=False), record(REPLIES[0])], "classifier",
                   guard=load_classifier(folder, "Refusal"), **settings)  # fmt: skip
    assert [one["verdict"] for one in judged[:2]] == ["invalid"] * 2 and judged[2]["verdict"] != "invalid"
    assert judged[2]["reply_language"] == "en"


def test_a_folder_that_holds_no_classifier_or_another_label_is_refused(folder, tmp_path):
    def refused(path, label="Refusal") -> str:
        with pytest.raises(InputError) as error:
            load_classifier(path, label)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "--refusal_label yes: the labels of" in refused(folder, "yes") and "Non-refusal, Refusal" in refused(
        folder, "yes"
    )
    assert "cannot be loaded" in refused(tmp_path)
    BertForMaskedLM.from_pretrained(folder).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_bytes((folder / "tokenizer_config.json").read_bytes())
    assert "is not among its weights; give a model that was trained to classify" in refused(tmp_path)


# --- two judges ---


def test_kappa_of_published_and_of_extreme_tables():
    table = [("a", "a")] * 45 + [("a", "b")] * 15 + [("b", "a")] * 25 + [("b", "b")] * 15  # p 0.60, chance 0.54
    assert kappa(table) == pytest.approx((0.60 - 0.54) / (1 - 0.54))
    assert kappa([("a", "a"), ("b", "b"), ("c", "c")]) == 1.0 and kappa([("a", "b"), ("b", "a")]) == -1.0
    independent = [(x, y) for x in "aab" for y in "abb"]
    assert kappa(independent) == pytest.approx(0.0)
    assert kappa([]) is None and kappa([("a", "a")] * 5) is None and kappa([("a", "b")] * 5) == 0.0


def test_two_judges_are_compared_by_language_and_each_difference_is_one_line():
    first = [record("yes"), record("no", "compliance"), record("a\nb", "invalid"), record("x", "unscored", "sw")]
    second = [record("x", "refusal", "sw"), record("a\nb", "compliance"), record("no", "compliance"), record("yes")]
    text = compared(first, second, ("a.jsonl", "b.jsonl")).splitlines()
    assert text[0].startswith("a.jsonl / b.jsonl on the same replies") and text[0].endswith("unscored by either: 1")
    # agree 2 of 3; by chance 1/3 · 1/3 + 1/3 · 2/3 = 1/3, so that κ is 1/2
    assert [line.split() for line in text[2:5]] == [
        ["replies", "agree,", "%", "κ"], ["en", "3", "66.7", "0.50"], ["all", "3", "66.7", "0.50"]]  # fmt: skip
    assert text[6:] == ["they differ on 2:", "", "en a b: invalid / compliance: a b", "sw x: unscored / refusal: x"]
    with pytest.raises(InputError, match=r"--compare b: has no verdict on the reply to 'yes' in en"):
        compared(first, [record("yes", prompt="another")], ("a", "b"))


def test_the_command_judges_by_a_classifier_and_compares(folder, tmp_path, monkeypatch, capsys):
    def safety(*arguments):
        monkeypatch.setattr(sys, "argv", ["mlc_min.safety", *map(str, arguments)])
        main()

    test = tmp_path / "rows.csv"
    test.write_text("id,en,sw\n1,How?,Vipi?\n2,Why?,Kwa nini?\n", "utf-8")
    safety("generate", "--control", "always-refuse", "--test", test, "--output", tmp_path)
    safety("judge", "--judge", "phrases", "--output", tmp_path)
    phrases = tmp_path / "phrases.jsonl"
    (tmp_path / "verdicts.jsonl").rename(phrases)
    flags = ["--judge", f"classifier:{folder}", "--refusal_label", "Refusal", "--compare", phrases]
    safety("judge", "--output", tmp_path, *flags)
    lines = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text("utf-8").splitlines()]
    assert {line["judge"] for line in lines} == {f"classifier:{folder}"} and len(lines) == 4
    printed = (tmp_path / "compared.txt").read_text("utf-8")
    differ = Counter(line["verdict"] for line in lines)["compliance"]  # phrases finds a refusal in each
    assert f"they differ on {differ}:" in printed and printed.strip() in capsys.readouterr().out
    (tmp_path / "compared.txt").unlink()
    safety("judge", "--output", tmp_path, "--compare", phrases)  # of the verdicts that are there
    assert (tmp_path / "compared.txt").read_text("utf-8") == printed
    (tmp_path / "other").mkdir()
    phrases.rename(tmp_path / "other/verdicts.jsonl")
    safety("judge", "--output", tmp_path, "--compare", tmp_path / "other")  # by their folder
    found = (tmp_path / "compared.txt").read_text("utf-8")
    assert found == printed.replace(str(phrases), str(tmp_path / "other/verdicts.jsonl"))
    for wrong, what in (
        (["--judge", f"classifier:{folder}"], "say with --refusal_label which of its labels means a refusal"),
        (["--judge", "classifier:"], "take auto, exact, phrases, guard:<model> or classifier:<model>"),
        (["--judge_text", "x"], "must have {reply} in it"),
        (["--judge", "phrases", "--compare", tmp_path / "none.jsonl"], "none.jsonl"),
    ):
        with pytest.raises(InputError, match=what.replace("{", r"\{")):
            safety("judge", "--output", tmp_path, *wrong)

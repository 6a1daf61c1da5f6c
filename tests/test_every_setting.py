"""Each setting of a training run changes what it says it changes, by hand-computed values where there are any.

`CHECKS` has an entry for every field of TrainConfig, and a test sees to that: a setting that does nothing is noticed.
"""

import copy
import dataclasses
import json
import math
import sys
from collections.abc import Callable

import pytest
import torch

from mlc_min import cosine_loss, mlc_loss
from mlc_min.consistency import BrokenDown, separation_loss
from mlc_min.examples import Example, shuffle_translations
from mlc_min.lab.sentences import EMBEDDED
from mlc_min.loop import Run, alignment_loss, arithmetic, consistency_loss, row_order, train, with_reference
from mlc_min.machinery.errors import InputError
from mlc_min.machinery.settings import FIELDS
from mlc_min.states import last_token_states
from mlc_min.train import TrainConfig, fit, main

LANGUAGES = ("en", "zh", "sw")


def settings(**changes) -> TrainConfig:
    usual = dict(
        languages="en,zh,sw", steps=4, batch_size=2, extractor_dim=16, freeze="", learning_rate=1e-3, log_every=1
    )
    return TrainConfig(**(usual | {"device": "cpu"} | changes))


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    draw = torch.Generator().manual_seed(5)

    def ids(low: int, high: int) -> list[int]:
        return torch.randint(3, 64, (int(torch.randint(low, high, (1,), generator=draw)),), generator=draw).tolist()

    return [
        Example(f"rows:{i + 1}", {code: ids(2, 9) for code in LANGUAGES}, [*ids(1, 6), 2], [*ids(2, 7), 2])
        for i in range(8)
    ]


class Case:
    """What a check may use: fresh copies of a tiny model, examples, and runs of the loop and of the command."""

    def __init__(self, tiny_model, examples, tmp_path, monkeypatch, capsys):
        self.tiny, self.examples, self.tmp_path = tiny_model, examples, tmp_path
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def model(self):
        return copy.deepcopy(self.tiny)

    def fit(self, model=None, output=None, **changes):
        """(extractor, history) of a run of the loop."""
        return fit(settings(**changes), model or self.model(), self.examples, output, quiet=True)

    def history(self, **changes) -> list[dict]:
        return self.fit(**changes)[1]

    def figures(self, **changes) -> list[dict]:
        """What the loop yields, with the rows of each step."""
        config, model = settings(**changes), self.model()
        examples = with_reference(model, self.examples, config) if config.method == "dpo" else self.examples
        return list(train(Run.start(model, config), examples, config))

    def consistency(self, **changes) -> float:
        """The consistency loss of all examples, without an extractor."""
        return consistency_loss(self.tiny, torch.nn.Identity(), self.examples, settings(**changes)).item()

    def states(self, layer: int) -> torch.Tensor:
        """(8, 3, 32) hidden states of the last prompt token, prompt by prompt, from the whole model."""
        rows = []
        for example in self.examples:
            for ids in example.prompts.values():
                output = self.tiny(torch.tensor([ids]), output_hidden_states=True)
                rows.append(output.hidden_states[layer][0, -1])
        return torch.stack(rows).view(8, 3, -1)

    def command(self, *arguments, rows: int = 4) -> dict:
        """A run of `python -m mlc_min.train` on few embedded rows; its record."""
        path = self.tmp_path / "rows.jsonl"
        lines = (EMBEDDED / "train.jsonl").read_text("utf-8").splitlines()
        path.write_text("\n".join(lines[:: len(lines) // rows][:rows]), "utf-8")
        usual = [
            "--train",
            path,
            "--output",
            self.tmp_path / "run",
            "--steps",
            1,
            "--batch_size",
            2,
            "--accumulation",
            1,
        ]
        usual += ["--languages", "en,zh", "--device", "cpu", "--extractor_dim", 16, "--log_every", 1]
        usual += ["--reference_cache", self.tmp_path / "cache"]
        self.monkeypatch.setattr(sys, "argv", ["train", *map(str, (*usual, *arguments))])
        self.monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        main()
        return json.loads((self.tmp_path / "run/model/train_config.json").read_text("utf-8"))

    def log(self) -> list[dict]:
        return [json.loads(line) for line in (self.tmp_path / "run/train_log.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture
def case(tiny_model, examples, tmp_path, monkeypatch, capsys) -> Case:
    return Case(tiny_model, examples, tmp_path, monkeypatch, capsys)


# --- the alignment loss, against the whole model's logits in float64 ---


def logp(model, prompt: list[int], response: list[int]) -> float:
    chances = model(torch.tensor([prompt + response])).logits[0].double().log_softmax(-1)
    return sum(chances[len(prompt) - 1 + k, token].item() for k, token in enumerate(response))


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


@pytest.mark.parametrize("method", ["sft", "dpo", "simpo", "orpo"])
@pytest.mark.parametrize("sft_weight", [0.0, 2.5])
def test_the_alignment_loss_and_its_figures_are_those_computed_by_hand(tiny_model, examples, method, sft_weight):
    config = settings(method=method, beta=0.3, simpo_beta=1.7, simpo_gamma=0.4, sft_weight=sft_weight)
    reference = [(-3.0 - i, -9.0 + i) for i in range(4)]
    batch = [dataclasses.replace(e, reference=r) for e, r in zip(examples[:4], reference, strict=True)]
    loss, figures = alignment_loss(tiny_model, batch, config)
    c = [logp(tiny_model, e.prompts["en"], e.chosen) for e in batch]
    r = [logp(tiny_model, e.prompts["en"], e.rejected) for e in batch]
    cn, rn = (
        [x / len(e.chosen) for x, e in zip(c, batch, strict=True)],
        [x / len(e.rejected) for x, e in zip(r, batch, strict=True)],
    )
    anchor = -sum(cn) / 4
    rewards = list(zip(cn, rn, strict=True))
    if method == "sft":
        align = anchor
    elif method == "dpo":
        rewards = [(0.3 * (a - x), 0.3 * (b - y)) for a, b, (x, y) in zip(c, r, reference, strict=True)]
        align = sum(softplus(-(a - b)) for a, b in rewards) / 4
    elif method == "simpo":
        align = sum(softplus(-(1.7 * (a - b) - 0.4)) for a, b in rewards) / 4
    else:
        odds = [a - b - math.log1p(-math.exp(a)) + math.log1p(-math.exp(b)) for a, b in rewards]
        align = sum(-a + 0.3 * softplus(-x) for (a, _), x in zip(rewards, odds, strict=True)) / 4
    has_anchor = method in ("dpo", "simpo") and sft_weight > 0
    assert loss.item() == pytest.approx(align + (sft_weight * anchor if has_anchor else 0), rel=1e-4)
    assert figures["align_loss"].item() == pytest.approx(align, rel=1e-4)
    assert ("sft_loss" in figures) == has_anchor
    if method != "sft":
        assert figures["margin"].item() == pytest.approx(sum(a - b for a, b in rewards) / 4, rel=1e-4)
        assert figures["chosen_reward"].item() == pytest.approx(sum(a for a, _ in rewards) / 4, rel=1e-4)
        assert figures["accuracy"].item() == sum(a > b for a, b in rewards) / 4


def test_the_gradient_of_accumulated_steps_and_their_figures_are_those_of_one_large_batch(case):
    usual = dict(method="simpo", mlc_weight=0.8, steps=1)
    one = case.history(batch_size=8, accumulation=1, **usual)[0]
    two = case.history(batch_size=2, accumulation=4, **usual)[0]
    for name in ("loss", "align_loss", "sft_loss", "margin", "accuracy", "consistency_loss", "grad_norm"):
        assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name


def test_a_gradient_that_is_not_finite_ends_the_run_before_the_step(case):
    model, config = case.model(), settings(method="sft", steps=3)
    handle = model.model.norm.weight.register_hook(lambda gradient: gradient * math.nan)
    before = [p.detach().clone() for p in model.parameters()]
    run = Run.start(model, config)
    with pytest.raises(BrokenDown, match=r"step 0: .*norm nan; look at the rows rows:\d"):
        next(train(run, case.examples, config))
    handle.remove()
    assert run.step == 0 and all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# --- one check a setting ---

CHECKS: dict[str, Callable[[Case], None]] = {}


def checks(*names: str):
    def register(function):
        CHECKS.update(dict.fromkeys(names, function))
        return function

    return register


@checks("preset", "config", "chat_template", "model", "train", "output", "languages")
def _(case):
    template = case.tmp_path / "template"
    text = (EMBEDDED / "model/chat_template.jinja").read_text("utf-8")
    template.write_text(text.replace("<user>", "<user>!"))
    (case.tmp_path / "a.yaml").write_text("mlc_tau: 0.7\n")
    model = case.tmp_path / "copy"
    model.mkdir()
    for path in (EMBEDDED / "model").iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    record = case.command("--model", model, "--config", case.tmp_path / "a.yaml", "--chat_template", template, rows=3)
    assert record["settings"]["preset"] == "paper" and record["settings"]["mlc_tau"] == 0.7
    assert record["settings"]["model"] == str(model) and record["rows"]["read"] == 3
    assert "<user>!" in (case.tmp_path / "run/model/chat_template.jinja").read_text("utf-8")
    assert case.log()[0]["mlc_ceiling"] == pytest.approx(math.log(2))  # two languages
    assert "preset paper" in case.capsys.readouterr().out


@checks("method", "beta", "simpo_beta", "simpo_gamma", "sft_weight")
def _(case):
    """By hand above; here, that the loop hands them down."""
    for name, value, method in (
        ("beta", 0.7, "orpo"), ("simpo_beta", 3.0, "simpo"), ("simpo_gamma", 2.0, "simpo"), ("sft_weight", 3.0, "dpo"),
    ):  # fmt: skip
        usual, other = (case.figures(steps=1, method=method, **more)[0] for more in ({}, {name: value}))
        batch = [dataclasses.replace(row, reference=row.reference or (0, 0)) for row in other["rows"]]
        expected = alignment_loss(case.tiny, batch, settings(method=method, **{name: value}))[0].item()
        assert other["loss"].item() == pytest.approx(expected, rel=1e-5) and other["loss"] != usual["loss"]


@checks("mlc_weight")
def _(case):
    plain, weighted = case.history(steps=1)[0], case.history(steps=1, mlc_weight=2.5)[0]
    assert weighted["loss"] == pytest.approx(plain["loss"] + 2.5 * weighted["consistency_loss"], rel=1e-6)
    assert "consistency_loss" not in plain


@checks("mlc_tau", "mlc_form", "mlc_layer", "consistency")
def _(case):
    for layer in (1, -1):
        for form in ("official", "paper"):
            expected = mlc_loss(case.states(layer), 0.7, form).item()
            ours = case.consistency(mlc_layer=layer, mlc_tau=0.7, mlc_form=form)
            assert ours == pytest.approx(expected, abs=1e-5)
    assert case.consistency(consistency="cosine") == pytest.approx(cosine_loss(case.states(-1)).item(), abs=1e-5)
    history = case.history(steps=1, mlc_weight=1.0, mlc_tau=0.7, mlc_form="paper", extractor="identity", mlc_layer=2)
    assert history[0]["mlc_loss"] == pytest.approx(mlc_loss(case.states(2), 0.7, "paper").item(), abs=1e-5)


@checks("mlc_parts")
def _(case):
    passes = []
    real = last_token_states
    case.monkeypatch.setattr("mlc_min.states.last_token_states", lambda *a: passes.append(1) or real(*a))
    losses = []
    for parts in (1, 3):
        passes.clear()
        losses.append(case.consistency(mlc_parts=parts))
        assert len(passes) == parts
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@checks("mlc_every")
def _(case):
    history = case.history(steps=5, mlc_weight=0.5, mlc_every=2)
    assert ["consistency_loss" in line for line in history] == [True, False, True, False, True]


@checks("separate_weight")
def _(case):
    states = case.states(-1)
    expected = mlc_loss(states, 0.7).item() + 3 * separation_loss(states, 0.7).item()
    assert case.consistency(mlc_tau=0.7, separate_weight=3.0) == pytest.approx(expected, abs=1e-5)


@checks("center_languages")
def _(case):
    own = dict(steps=2, batch_size=4, mlc_weight=1.0, extractor="identity", learning_rate=1e-9, warmup=0.0)
    places = [[int(row.where[5:]) - 1 for row in step["rows"]] for step in case.figures(**own)]
    first, second = (case.states(-1)[rows] for rows in places)
    batch = [mlc_loss(states - states.mean(0)).item() for states in (first, second)]
    mean = (first.mean(0) + second.mean(0)) / 2
    for kind, expected in (("batch", batch), ("running", [batch[0], mlc_loss(second - mean).item()])):
        history = case.history(center_languages=kind, **own)
        assert [line["consistency_loss"] for line in history] == pytest.approx(expected, abs=1e-4)
    case.examples = [*case.examples[:-1], dataclasses.replace(case.examples[-1], prompts={"en": [5], "zh": [6]})]
    for changes, words in ((own, "rows:8: lacks a language"), (own | {"batch_size": 1}, "--batch_size of at least 2")):
        if "batch_size" in words:
            case.examples = case.examples[:-1]
        with pytest.raises(InputError, match=words):
            case.fit(center_languages="running", **changes)


@checks("extractor", "extractor_dim")
def _(case):
    learned, frozen = (case.fit(mlc_weight=1.0, extractor=kind, extractor_dim=7)[0] for kind in ("learned", "frozen"))
    assert learned.out_features == frozen.out_features == 7
    torch.manual_seed(0)
    start = torch.nn.Linear(32, 7)
    assert torch.equal(frozen.weight, start.weight) and not torch.equal(learned.weight, start.weight)
    assert isinstance(case.fit(mlc_weight=1.0, extractor="identity")[0], torch.nn.Identity)


@checks("shuffle_translations", "seed")
def _(case):
    for seed in (0, 3):
        config = settings(mlc_weight=1.0, extractor="identity", batch_size=8, seed=seed)
        others = shuffle_translations(case.examples, seed)
        expected = consistency_loss(case.tiny, torch.nn.Identity(), others, config).item()
        own = dict(steps=1, mlc_weight=1.0, extractor="identity", batch_size=8, seed=seed)
        shuffled, true = case.history(shuffle_translations=True, **own)[0], case.history(**own)[0]
        assert shuffled["consistency_loss"] == pytest.approx(expected, abs=1e-6)
        assert shuffled["consistency_loss"] != pytest.approx(true["consistency_loss"], abs=1e-3)
        assert shuffled["align_loss"] == true["align_loss"]  # the same replies to the same English prompts
        assert shuffled["mlc_loss"] == true["mlc_loss"]  # the probe is of true translations in both
        rows = [row.where for row in case.figures(seed=seed, steps=1)[0]["rows"]]
        order = row_order(8, seed)
        assert rows == [f"rows:{next(order) + 1}" for _ in range(2)]
    assert shuffle_translations(case.examples, 0) != shuffle_translations(case.examples, 3)


@checks("harmful_only")
def _(case):
    assert case.command(rows=8)["rows"]["used"] == 8
    assert 0 < case.command("--harmful_only", "true", rows=8)["rows"]["used"] < 8


@checks("freeze")
def _(case):
    model = case.model()
    case.fit(model, freeze="layers.0,embed_tokens")
    moved = {
        name
        for (name, a), b in zip(model.named_parameters(), case.tiny.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert moved and not any("layers.0" in name or "embed_tokens" in name for name in moved)


@checks("lora", "lora_alpha")
def _(case):
    pytest.importorskip("peft")
    for arguments, alpha in ((("--lora", 3), 6), (("--lora", 3, "--lora_alpha", 5), 5)):
        case.command(*arguments)
        adapters = json.loads((case.tmp_path / "run/model/adapter_config.json").read_text("utf-8"))
        assert (adapters["r"], adapters["lora_alpha"]) == (3, alpha)


@checks("learning_rate", "warmup", "steps")
def _(case):
    rates = [line["learning_rate"] for line in case.history(steps=10, warmup=0.3, learning_rate=0.01)]
    warm = [0.01 * k / 3 for k in range(3)]
    cosine = [0.005 * (1 + math.cos(math.pi * k / 7)) for k in range(7)]
    assert rates == pytest.approx([*warm, *cosine])


@checks("weight_decay", "max_grad_norm")
def _(case):
    decayed, plain = (Run.start(case.model(), settings(weight_decay=value)) for value in (0.4, 0.0))
    assert [run.optimizer.defaults["weight_decay"] for run in (decayed, plain)] == [0.4, 0.0]
    asked = []
    clip = torch.nn.utils.clip_grad_norm_
    case.monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, norm: asked.append(norm) or clip(p, norm))
    case.history(steps=1, max_grad_norm=0.03)
    assert asked == [0.03]


@checks("epochs")
def _(case):
    assert case.command("--epochs", 1.5, rows=5)["settings"]["steps"] == 4  # 7.5 rows in batches of 2, rounded up
    assert len(case.log()) == 4


@checks("batch_size", "accumulation")
def _(case):
    steps = case.figures(steps=2, batch_size=2, accumulation=2)
    assert [len(step["rows"]) for step in steps] == [4, 4]
    assert len({row.where for step in steps for row in step["rows"]}) == 8


@checks("max_length", "too_long")
def _(case):

    with pytest.raises(InputError, match=r"row|:\d+: longer than --max_length 16"):
        case.command("--max_length", 16, "--too_long", "error")
    with pytest.raises(InputError, match="--max_length 16: no row fits"):
        case.command("--max_length", 16)


@checks("missing")
def _(case):
    """Translations that lack: test_trainer_options.py; here responses."""
    path = case.tmp_path / "some.jsonl"
    row = {
        "prompt": "How can I draw the bus?",
        "prompt_zh": "我怎样才能画公交车？",
        "chosen": "Sorry",
        "rejected": "Sure",
    }
    path.write_text(
        "\n".join(json.dumps(r) for r in (row, row | {"chosen": ""}, row | {"rejected": {"value": " "}}, row))
    )
    with pytest.raises(ValueError, match=r"some.jsonl:2: field 'chosen' is empty"):
        case.command("--train", path)
    counts = case.command("--train", path, "--missing", "skip")["rows"]
    assert (counts["read"], counts["lacking_responses"], counts["used"]) == (4, 2, 2)
    assert "2 a response (--missing skip)" in case.capsys.readouterr().out
    counts = case.command("--train", path, "--missing", "skip", "--method", "sft")["rows"]
    assert (counts["lacking_responses"], counts["used"]) == (1, 3)


@checks("group_by_length")
def _(case):
    def lengths(**changes):
        rows = [row for step in case.figures(**changes) for row in step["rows"]]
        return [len(e.prompt) + max(len(e.chosen), len(e.rejected)) for e in rows]

    assert lengths(group_by_length=True) == sorted(lengths(), reverse=True) != lengths()


@checks("device")
def _(case):

    with pytest.raises(InputError, match="--device nonsense"):
        case.command("--device", "nonsense")


@checks("dtype")
def _(case):
    for dtype, inside in (("bfloat16", True), ("float32", False)):
        with arithmetic(case.tiny, settings(dtype=dtype)):
            assert torch.is_autocast_enabled("cpu") is inside
    kinds = [
        [e.reference for e in with_reference(case.tiny, case.examples, settings(dtype=d))]
        for d in ("float32", "bfloat16")
    ]
    assert kinds[0] != kinds[1]  # the reference is computed in the policy's arithmetic
    assert case.command("--dtype", "auto")["settings"]["dtype"] == "float32"  # on a CPU


@checks("gradient_checkpointing")
def _(case):
    plain, saving = case.model(), case.model()
    case.fit(plain, mlc_weight=1.0)
    case.fit(saving, mlc_weight=1.0, gradient_checkpointing=True)
    assert saving.is_gradient_checkpointing and not plain.is_gradient_checkpointing


@checks("attention")
def _(case):
    from mlc_min.machinery.models import load_model

    assert load_model(EMBEDDED / "model", attention="eager")[0].config._attn_implementation == "eager"
    asked = []
    case.monkeypatch.setattr("mlc_min.machinery.models.load_model", lambda *a: asked.append(a[3]) or load_model(*a))
    case.command("--attention", "eager")
    assert asked == ["eager"]


@checks("reference_cache")
def _(case):
    case.command()
    assert [path.suffix for path in (case.tmp_path / "cache").iterdir()] == [".safetensors"]
    case.command("--reference_cache", case.tmp_path / "other")
    assert len(list((case.tmp_path / "other").iterdir())) == 1


@checks("save_every", "resume")
def _(case):
    output = case.tmp_path / "run"
    case.fit(output=output, steps=5, save_every=2)
    state = torch.load(output / "checkpoint.pt", weights_only=True)
    assert state["step"] == 5  # and once more at the end, so that nothing is lost if the model cannot be saved
    before = [line["loss"] for line in case.fit(output=output, steps=5, save_every=2)[1]]
    resumed = case.fit(output=output, steps=5, save_every=2, resume=True)[1]
    assert [line["loss"] for line in resumed] == before


@checks("log_every")
def _(case):
    assert [line["step"] for line in case.history(steps=8, log_every=3)] == [0, 3, 6, 7]


@checks("report_to")
def _(case):
    pytest.importorskip("tensorboard")
    case.command("--report_to", "tensorboard")
    assert list((case.tmp_path / "run/tensorboard").iterdir())


def test_every_setting_has_a_check():
    assert set(CHECKS) == set(FIELDS)


@pytest.mark.parametrize(
    "names", [sorted(n for n in CHECKS if CHECKS[n] is f) for f in dict.fromkeys(CHECKS.values())], ids="-".join
)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers in a way that is going out of use
def test_a_setting_changes_what_it_says_it_changes(case, names):
    CHECKS[names[0]](case)

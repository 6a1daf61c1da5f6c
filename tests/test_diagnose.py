"""Every figure of the diagnostics against NumPy, on fixed states; and the states against the model's own."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mlc_min.consistency import BrokenDown
from mlc_min.evaluation.diagnose import diagnose, probe_figures, prompt_states
from mlc_min.examples import Row, encode_prompt

LANGUAGES = ("en", "zh", "sw")
N, WIDTH = 5, 7  # prompts, hidden size
ROWS = [Row(f"x:{i}", dict.fromkeys(LANGUAGES, "a")) for i in range(N)]


@pytest.fixture(scope="module")
def states() -> np.ndarray:
    """(N, 3, WIDTH): zh lies near its English prompt, sw on the English prompt of the next row but two."""
    draw = np.random.default_rng(0)
    english = draw.normal(size=(N, WIDTH))
    chinese = english + 0.4 * draw.normal(size=(N, WIDTH))
    swahili = english.copy()
    swahili[:2] = english[2:4]
    return np.stack([english, chinese, 3 * swahili], axis=1)


def by_numpy(states: np.ndarray, tau: float) -> dict:
    """Loss, collinearity and spectrum by their definitions."""
    unit = states / np.linalg.norm(states, axis=-1, keepdims=True)
    sigma = np.linalg.svd(unit, compute_uv=False)
    powers = np.exp(sigma / sigma[:, :1] / tau)
    loss = -np.log(powers[:, 0] / powers.sum(-1)).mean()
    return {"mlc_loss": loss, "collinearity": (sigma[:, 0] ** 2 / 3).mean(), "spectrum": sigma.mean(0)}


@pytest.fixture
def figures(states, monkeypatch):
    """`diagnose` on the fixed states; what it asked for them with is in `asked`."""

    def measured(asked: list | None = None, **settings) -> dict:
        def fixed(*arguments):
            if asked is not None:
                asked.append(arguments)
            return torch.tensor(states, dtype=torch.float32)

        monkeypatch.setattr("mlc_min.evaluation.diagnose.prompt_states", fixed)
        return diagnose("model", "tokenizer", ROWS, LANGUAGES, **settings)

    return measured


@pytest.mark.parametrize("tau", [0.2, 0.7])
def test_loss_collinearity_and_spectrum_are_those_of_the_definitions(states, figures, tau):
    found = figures(tau=tau)
    for name, value in by_numpy(states, tau).items():
        assert found[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("tau", [0.2, 0.7])
def test_the_shuffled_figures_are_those_of_groups_in_which_language_j_comes_from_the_jth_next_prompt(
    states, figures, tau
):
    shuffled = np.array([[states[(n - j) % N, j] for j in range(3)] for n in range(N)])
    found = figures(tau=tau)
    for name, value in by_numpy(shuffled, tau).items():
        assert found[f"{name}_shuffled"] == pytest.approx(value, rel=1e-5), name
        assert found[name] != pytest.approx(value, rel=1e-2), name


@pytest.mark.parametrize("tau", [0.2, 0.7])
def test_floor_and_ceiling_are_the_losses_of_one_line_and_of_equal_singular_values(figures, tau):
    found = figures(tau=tau)
    one_line, equal = np.exp(np.array([1, 0, 0]) / tau), np.ones(3)
    assert found["mlc_floor"] == pytest.approx(-np.log(one_line[0] / one_line.sum()))
    assert found["mlc_ceiling"] == pytest.approx(-np.log(equal[0] / equal.sum()))


def test_without_a_temperature_it_is_the_papers(states, figures):
    assert figures()["mlc_loss"] == pytest.approx(by_numpy(states, 0.2)["mlc_loss"], rel=1e-5)


def test_retrieval_is_per_language_in_percent_and_chance_is_one_prompt_of_all(states, figures):
    unit = states / np.linalg.norm(states, axis=-1, keepdims=True)
    expected = {}
    for j, language in ((1, "zh"), (2, "sw")):
        nearest = (unit[:, j] @ unit[:, 0].T).argmax(-1)
        expected[language] = 100 * (nearest == np.arange(N)).mean()
    found = figures()
    assert found["retrieval"] == pytest.approx(expected) and list(expected.values()) == [100, 60]
    assert found["retrieval_chance"] == 100 / N


def test_the_states_are_asked_for_with_all_that_was_given(figures):
    asked: list = []
    assert figures(asked, layer=2)["layer"] == 2
    assert asked == [("model", "tokenizer", ROWS, LANGUAGES, 2)]
    assert figures(asked)["layer"] == -1 and asked[1][-1] == -1


@pytest.mark.parametrize("layer", [0, 2, -1])
def test_states_are_the_models_own_at_the_last_prompt_token(base, test_rows, layer):
    model, tokenizer = base
    rows = test_rows[::90]
    found = prompt_states(*base, rows, LANGUAGES, layer)
    assert found.shape == (len(rows), 3, model.config.hidden_size) and found.dtype == torch.float32
    for i, row in enumerate(rows):
        for j, language in enumerate(LANGUAGES):
            ids = torch.tensor([encode_prompt(tokenizer, row.prompts[language])])
            with torch.no_grad():
                own = model(ids, output_hidden_states=True).hidden_states[layer][0, -1]
            torch.testing.assert_close(found[i, j], own, atol=1e-5, rtol=1e-4)
    default = prompt_states(*base, rows, LANGUAGES)
    torch.testing.assert_close(default, prompt_states(*base, rows, LANGUAGES, model.config.num_hidden_layers))
    assert not found.requires_grad


def test_a_system_text_is_part_of_the_prompt(base):
    model, tokenizer = base[0], copy.deepcopy(base[1])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}<assistant>"
    bare, told = (Row("x:1", {"en": "How?", "zh": "怎么"}, system=system) for system in (None, "Be brief. "))
    states = [prompt_states(model, tokenizer, [row], ("en", "zh")) for row in (bare, told)]
    assert not torch.allclose(*states, atol=1e-3)


def test_states_that_are_nan_are_an_error_and_not_a_figure(base, test_rows):
    model = copy.deepcopy(base[0])
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(BrokenDown, match="NaN"):
        diagnose(model, base[1], test_rows[:3], LANGUAGES)


# --- the figures of the training log ---


def probe(states_by_size: dict[int, np.ndarray], monkeypatch, **recipe) -> dict:
    """`probe_figures` of states that are given; 2 dimensions after the extractor, fewer than languages."""
    groups = {m: torch.tensor(states, dtype=torch.float32) for m, states in states_by_size.items()}
    monkeypatch.setattr("mlc_min.evaluation.diagnose.groups_of_states", lambda *_: groups)
    count = sum(len(states) for states in states_by_size.values())
    return probe_figures(None, lambda x: x[..., :2], [None] * count, SimpleNamespace(**recipe))


def test_the_figures_of_the_log_are_those_of_the_definitions(states, monkeypatch):
    found = probe({3: states}, monkeypatch, mlc_tau=0.7, mlc_form="official")
    shuffled = np.stack([np.roll(states[:, j], j, axis=0) for j in range(3)], axis=1)
    raw, after = by_numpy(states, 0.7), by_numpy(states[..., :2], 0.7)
    expected = {
        "mlc_loss": after["mlc_loss"], "mlc_shuffled": by_numpy(shuffled[..., :2], 0.7)["mlc_loss"],
        "mlc_floor": np.log(1 + np.exp(-1 / 0.7)), "mlc_ceiling": np.log(2),
        "collinearity": raw["collinearity"], "collinearity_shuffled": by_numpy(shuffled, 0.7)["collinearity"],
        "retrieval": nearest(states)[1:].mean(), "retrieval_chance": 1 / N,
    }  # fmt: skip
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-4), name
    paper = probe({3: states}, monkeypatch, mlc_tau=0.7, mlc_form="paper")
    assert paper["mlc_floor"] == pytest.approx(np.log(1 + np.exp(-(3**0.5) / 0.7)))


def test_the_figures_of_the_log_weigh_groups_by_their_prompts_and_leave_out_what_one_group_does_not_have(
    states, monkeypatch
):
    settings = dict(mlc_tau=0.2, mlc_form="official")
    two, three = states[:4, :2], states[:1]  # four prompts in two languages, one in three
    found = probe({2: two, 3: three}, monkeypatch, **settings)
    alone = [probe({2: two}, monkeypatch, **settings), probe({3: three}, monkeypatch, **settings)]
    losses = [float(figures["mlc_loss"]) for figures in alone]
    assert float(found["mlc_loss"]) == pytest.approx(0.8 * losses[0] + 0.2 * losses[1])
    for name in ("retrieval", "retrieval_chance", "mlc_shuffled"):  # of the four alone
        assert float(found[name]) == pytest.approx(float(alone[0][name])), name
    assert "retrieval" not in alone[1] and "mlc_shuffled" not in alone[1]
    single = probe({1: states[:, :1]}, monkeypatch, **settings)  # in one language there is nothing to find
    assert "retrieval" not in single and float(single["mlc_loss"]) == 0.0


def nearest(states: np.ndarray) -> np.ndarray:
    """Share of prompts whose nearest English prompt is their own, by language."""
    unit = states / np.linalg.norm(states, axis=-1, keepdims=True)
    found = np.einsum("nmd,kd->nmk", unit, unit[:, 0]).argmax(-1)
    return (found == np.arange(N)[:, None]).mean(0)

"""Which layer: the figures of each layer against definitions, and the command."""

import json

import numpy as np
import pytest
import torch

from mlc_min.evaluation.diagnose import collinearity
from mlc_min.evaluation.layers import by_layer, main, silhouette, states_by_layer, suggested_layer
from mlc_min.examples import encode_prompt
from mlc_min.machinery.errors import InputError


def test_silhouette_is_rousseeuw_s():
    generator = torch.Generator().manual_seed(0)
    states, labels = torch.randn(9, 4, generator=generator), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    x = states.double().numpy()
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    expected = []
    for i in range(9):
        same = [j for j in range(9) if labels[j] == labels[i] and j != i]
        a = np.mean([1 - unit[i] @ unit[j] for j in same])
        b = min(
            np.mean([1 - unit[i] @ unit[j] for j in range(9) if labels[j] == other])
            for other in {0, 1, 2} - {int(labels[i])}
        )
        expected.append((b - a) / max(a, b))
    assert silhouette(states, labels) == pytest.approx(np.mean(expected))


def test_states_by_layer_are_those_of_each_prompt_alone(base, test_rows):
    model, tokenizer = base
    states = states_by_layer(model, tokenizer, test_rows[:2], ("en", "ur"))
    for i, row in enumerate(test_rows[:2]):
        for j, code in enumerate(("en", "ur")):
            with torch.no_grad():
                ids = torch.tensor([encode_prompt(tokenizer, row.prompts[code])])
                alone = model(ids, output_hidden_states=True).hidden_states
            assert torch.allclose(states[:, i, j], torch.stack([h[0, -1] for h in alone]), atol=1e-4)


def test_by_layer_takes_the_mean_of_each_language_away_and_leaves_out_states_without_direction():
    generator = torch.Generator().manual_seed(1)
    meaning = torch.randn(6, 1, 8, generator=generator)
    common = 20 * torch.randn(1, 3, 8, generator=generator)  # one large vector a language
    states = torch.stack([torch.ones(6, 3, 8), meaning + common, meaning.expand(6, 3, 8)])
    figures = by_layer(states)
    assert figures["collinearity_raw"][1] == pytest.approx(collinearity(meaning + common).mean().item())
    assert figures["collinearity_centred"][1:] == pytest.approx([1, 1], abs=1e-5)
    assert figures["collinearity_shuffled_centred"][1] < 0.8
    assert figures["retrieval_centred"][1:] == [1, 1] and figures["collinearity_centred"][0] is None
    assert figures["silhouette_meaning"][1] < 0 < 0.999 < figures["silhouette_meaning"][2]
    assert {name: values[0] for name, values in figures.items()} == dict.fromkeys(figures)  # the same state everywhere
    assert suggested_layer(figures) == 2
    # A mean of equal states is equal to them but for rounding, which is as large as they are.
    large = torch.full((7, 3, 8), 160.1) + 1e-4 * torch.randn(7, 3, 8, generator=generator)
    assert by_layer(large[None])["collinearity_centred"] == [None]


def test_the_suggested_layer_has_the_largest_difference_of_silhouettes_from_the_least_entry_on():
    figures = {"silhouette_meaning": [0.9, 0.1, 0.3, 0.2], "silhouette_language": [0.0, 0.3, 0.1, 0.1]}
    assert suggested_layer(figures) == 2 and suggested_layer(figures, 3) == 3 and suggested_layer(figures, 0) == 0


def test_the_command_prints_a_row_a_layer_and_a_suggestion_and_saves_both(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["layers", "--rows", "12", "--output", str(tmp_path / "out")])
    main()
    out = capsys.readouterr().out
    saved = json.loads((tmp_path / "out/layers.json").read_text(encoding="utf-8"))
    assert f"suggested: --mlc_layer {saved['suggested']}," in out and saved["suggested"] == suggested_layer(saved)
    assert [line.split()[0] for line in out.splitlines()[:6]] == ["entry", "0", "1", "2", "3", "4"]
    assert (tmp_path / "out/layers.png").read_bytes().startswith(b"\x89PNG")
    for arguments, words in ((["--rows", "1"], "at least 2"), (["--languages", "en"], "in 1 languages")):
        monkeypatch.setattr("sys.argv", ["layers", *arguments, "--output", str(tmp_path / "out")])
        with pytest.raises(InputError, match=words):
            main()

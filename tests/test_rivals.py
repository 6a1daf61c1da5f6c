"""What MLC is compared with: MPO's and DCO's losses by hand, and a refusal vector."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mlc_min.examples import pad
from mlc_min.lab import rivals
from mlc_min.lab.experiment import RIVALS, World, in_every_language, steered
from mlc_min.lab.sentences import ALIGNED
from mlc_min.states import last_token_states
from mlc_min.train import TrainConfig


@pytest.fixture(scope="module")
def world() -> World:
    whole = World.load(device="cpu", test_rows=1)
    return replace(whole, train_rows=whole.train_rows[::150])


def some(world: World) -> dict:
    return in_every_language(world, world.train_rows, TrainConfig())


def test_mpo_brings_the_gap_of_another_language_to_the_references_in_english():
    target, source = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 1.0])
    assert rivals.mpo_loss(target, source, 1.0).tolist() == [4.0, 9.0]
    assert rivals.mpo_loss(target, source, 3.0).tolist() == [0.0, 49.0]


def test_dco_moves_each_margin_by_what_the_other_language_has():
    reference = torch.tensor([6.0]), torch.tensor([-2.0])  # English is aligned, the other language is not
    assert rivals.dco_loss(reference, reference, 1.0).item() == 2 + 6
    met = torch.tensor([4.0]), torch.tensor([4.0])  # both have the sum: the languages agree
    assert rivals.dco_loss(met, reference, 1.0).item() == 0
    # β 2: English loses half of the other's margin, the other gains twice English's.
    assert rivals.dco_loss((torch.tensor([5.0]), torch.tensor([10.0])), reference, 2.0).item() == 0


@pytest.mark.parametrize("is_per_token", [True, False])
def test_gaps_are_those_of_the_models_own_log_probabilities(world, is_per_token):
    examples = some(world)["bn"][:3]
    found = rivals.gaps(world.base, examples, is_per_token).tolist()
    for example, gap in zip(examples, found, strict=True):
        logps = []
        for reply in (example.chosen, example.rejected):
            logits = world.base(torch.tensor([example.prompt + reply])).logits[0].double().log_softmax(-1)
            own = [logits[len(example.prompt) - 1 + k, token].item() for k, token in enumerate(reply)]
            logps.append(sum(own) / (len(own) if is_per_token else 1))
        assert gap == pytest.approx(logps[0] - logps[1], rel=1e-4, abs=1e-4)


def test_mean_states_leave_padding_out(world):
    examples = some(world)["en"][:2]
    both, alone = torch.cat([rivals.mean_states(world.base, own) for own in (examples, examples[:1])]).split([4, 2])
    assert torch.allclose(both[[0, 2]], alone, atol=1e-4)


@pytest.mark.parametrize("name", ["DPO, then MPO", "DPO, then DCO"])
def test_training_goes_on_towards_what_the_loss_asks_for(world, name):
    examples, model = some(world), copy.deepcopy(world.base)
    assert list(examples) == list(ALIGNED)

    per_token = RIVALS[name]["loss"] == "MPO"

    def gaps(own, code: str) -> torch.Tensor:
        return rivals.gaps(own, examples[code], per_token)

    def distance(own) -> float:
        """How far Swahili is from where it shall go: MPO to the reference's English gap, DCO that and its own."""
        wanted = gaps(world.base, "en") + (0 if per_token else gaps(world.base, "sw"))
        return (gaps(own, "sw") - wanted).abs().mean().item()

    with torch.no_grad():
        before = distance(world.base)
    rivals.go_on(model, RIVALS[name], examples, SimpleNamespace(steps=15, batch_size=4, seed=0))
    with torch.no_grad():
        assert distance(model) < 0.9 * before


def test_the_vector_is_the_difference_of_two_means_and_is_added_while_it_is_asked_for(world):
    prompts = [[list(e.prompt) for e in some(world)["en"][start : start + 2]] for start in (0, 3)]
    vector = rivals.refusal_vector(world.base, *prompts)
    layer = rivals.VECTOR["layer"]

    def mean_state(own: list[list[int]]) -> torch.Tensor:
        outputs = [world.base(torch.tensor([ids]), output_hidden_states=True) for ids in own]
        return torch.stack([output.hidden_states[layer][0, -1] for output in outputs]).mean(0).detach()

    means = [mean_state(own) for own in prompts]
    assert torch.allclose(vector, means[0] - means[1], atol=1e-4)
    batch = pad(prompts[0])
    plain = last_token_states(world.base, **batch, layer=layer)
    with rivals.steered(world.base, vector):
        moved = last_token_states(world.base, **batch, layer=layer)
    assert torch.allclose(moved - plain, (rivals.VECTOR["scale"] * vector).expand_as(plain), atol=1e-3)
    assert torch.equal(last_token_states(world.base, **batch, layer=layer), plain)
    with steered(world, world.base):
        assert not torch.equal(last_token_states(world.base, **batch, layer=layer), plain)

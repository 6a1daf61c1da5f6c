"""Which layer should the MLC loss look at? An answer without labels, layer by layer.

    python -m mlc_min.evaluation.layers --model <folder, .gguf file or Hub id> --test rows.jsonl --output runs/layers

In the lower layers states are grouped by language, near the end again; between them lies a layer where they are grouped
by meaning, as far as the model has one (LASA, arXiv 2604.12710). Two silhouettes find it. Beside them stands how
collinear translations are, and prompts that have nothing to do with each other: where both are alike, the plain loss
compares no meaning.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from mlc_min.evaluation.diagnose import collinearity, retrieval_accuracy, shuffle_groups
from mlc_min.evaluation.pictures import plot_layers
from mlc_min.evaluation.records import encode, in_world
from mlc_min.evaluation.report import aligned_text
from mlc_min.examples import Row, pad
from mlc_min.loop import batches_of
from mlc_min.machinery.errors import Help, InputError, run_command
from mlc_min.machinery.files import EMBEDDED, usable_folder, write_json
from mlc_min.machinery.models import load_model, pick_device
from mlc_min.machinery.rows import parse_languages, read_rows
from mlc_min.states import last_position, position_ids

BATCH = 32  # prompts a forward pass


@torch.no_grad()
def states_by_layer(
    model: PreTrainedModel, tokenizer: Tokenizer, rows: list[Row], languages: tuple[str, ...]
) -> Tensor:
    """Raw states of the last prompt token at every entry: (entries, rows, languages, d_h), float32."""
    prompts, found = encode(rows, tokenizer, languages), []
    for batch in tqdm(list(batches_of(prompts, BATCH)), "states", leave=False):
        padded = {name: tensor.to(model.device) for name, tensor in pad(batch).items()}
        positions = position_ids(padded["attention_mask"])
        output = model.get_decoder()(**padded, position_ids=positions, use_cache=False, output_hidden_states=True)
        last = last_position(padded["attention_mask"])
        found.append(torch.stack([h[torch.arange(len(batch)), last].float().cpu() for h in output.hidden_states]))
    return torch.cat(found, dim=1).unflatten(1, (len(rows), len(languages)))


def silhouette(states: Tensor, labels: Tensor) -> float:
    """Mean silhouette (Rousseeuw 1987) by cosine distance: (n, d) states in the groups of (n,) labels -> [-1, 1].

    Of a state: (b - a) / max(a, b), a its mean distance to the others of its group, b that to the nearest other group.
    Every group needs at least two members, and there must be two groups.
    """
    unit = states.double() / states.double().norm(dim=-1, keepdim=True)
    distance = (1 - unit @ unit.T).clamp(min=0)
    member = torch.nn.functional.one_hot(labels).double()  # (n, groups)
    sums, sizes = distance @ member, member.sum(0)
    own = (sums * member).sum(-1) / (member @ (sizes - 1))
    other = torch.where(member.bool(), math.inf, sums / sizes).amin(-1)
    return ((other - own) / torch.maximum(own, other)).mean().item()


LAYER_FIGURES = (
    "collinearity_raw", "collinearity_shuffled_raw", "retrieval_raw", "collinearity_centred",
    "collinearity_shuffled_centred", "retrieval_centred", "silhouette_meaning", "silhouette_language",
)  # fmt: skip


def by_layer(states: Tensor) -> dict[str, list[float | None]]:
    """Figures of each entry of (entries, N, m, d_h) states, raw and with the mean state of each language taken away;
    None for an entry where all prompts have the same state.

    collinearity: mean σ₁²/m of translations, and of unrelated prompts (_shuffled); retrieval: share of prompts whose
    nearest English prompt is their translation; silhouette_meaning, silhouette_language: of raw states, grouped by
    request and by language (LASA, arXiv 2604.12710).
    """
    n, m = states.shape[1:3]
    meaning, language = torch.arange(n).repeat_interleave(m), torch.arange(m).repeat(n)
    figures: dict[str, list[float | None]] = {name: [] for name in LAYER_FIGURES}
    for entry in states:
        flat, centred = entry.flatten(0, 1), entry - entry.mean(0)
        tiny = 1e-6 * max(1.0, entry.abs().max().item())  # what rounding leaves
        if (centred.abs().amax(-1) < tiny).any():  # entry 0 is the embedding of the same token for every prompt
            values = [None] * len(LAYER_FIGURES)
        else:
            values = [figure for own in (entry, centred) for figure in (
                collinearity(own).mean().item(), collinearity(shuffle_groups(own)).mean().item(),
                retrieval_accuracy(own)[1:].mean().item(),
            )]  # fmt: skip
            values += [silhouette(flat, meaning), silhouette(flat, language)]
        for name, value in zip(LAYER_FIGURES, values, strict=True):
            figures[name].append(value)
    return figures


def suggested_layer(figures: dict[str, list[float]], least: int = 1) -> int:
    """LASA's choice: the entry, from `least` on, where silhouette by meaning exceeds that by language the most."""
    both = list(zip(figures["silhouette_meaning"], figures["silhouette_language"], strict=True))
    return max(range(least, len(both)), key=lambda entry: both[entry][0] - both[entry][1])


def layers_table(figures: dict[str, list[float | None]]) -> str:
    """Plain text: a row an entry of `hidden_states`."""
    titles = ["entry", "σ₁²/m", "unrelated", "retrieval", "centred: σ₁²/m", "unrelated", "retrieval", "by meaning"]
    columns = zip(*(figures[name] for name in LAYER_FIGURES), strict=True)
    rows = [[str(k), *("–" if value is None else f"{value:.2f}" for value in own)] for k, own in enumerate(columns)]
    return aligned_text([[*titles, "by language"], *rows])


def main() -> None:
    parser = argparse.ArgumentParser("python -m mlc_min.evaluation.layers", description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--model", default=str(EMBEDDED / "model"), help="model folder in Hugging Face format, .gguf file or Hub id")
    add("--chat_template", help="file with the chat template, for a model that has none")
    add("--test", default=str(EMBEDDED / "validation.jsonl"), help="prompts with translations: JSONL, JSON list or CSV")
    add("--languages", default="auto", help="comma-separated codes; auto: those in the first row")
    add("--rows", type=int, default=40, help="prompts to look at, evenly over the file")
    add("--output", type=Path, default=Path("runs/layers"), help="folder for layers.json and layers.png")
    add("--device", default="auto", help="auto, cpu or cuda")
    arguments = parser.parse_args()
    if arguments.rows < 2:
        raise InputError(f"--rows {arguments.rows}: at least 2 prompts are compared")
    rows = read_rows(arguments.test, None if arguments.languages == "auto" else parse_languages(arguments.languages))
    rows = list({tuple(row.extra["combination"]) if in_world(row.extra) else row.where: row for row in rows}.values())
    rows = rows[:: math.ceil(len(rows) / arguments.rows)]
    languages = tuple(rows[0].prompts) if arguments.languages == "auto" else parse_languages(arguments.languages)
    if len(rows) < 2 or len(languages) < 2:
        raise InputError(f"{arguments.test}: {len(rows)} prompts in {len(languages)} languages; at least 2 of each")
    output = usable_folder(arguments.output, "--output")
    model, tokenizer = load_model(arguments.model, pick_device(arguments.device), chat_template=arguments.chat_template)
    figures = by_layer(states_by_layer(model, tokenizer, rows, languages))
    layer = suggested_layer(figures)
    write_json(output / "layers.json", {"suggested": layer, "prompts": len(rows), "languages": languages} | figures)
    plot_layers({Path(arguments.model).name: figures}, output / "layers.png")
    print(layers_table(figures))
    print(f"\n{len(rows)} prompts in {', '.join(languages)}; retrieval by chance {1 / len(rows):.2f}")
    print(f"suggested: --mlc_layer {layer}, where states are grouped by meaning most, compared with by language")
    print(f"saved in {output}/: layers.json, layers.png")


if __name__ == "__main__":
    run_command(main)

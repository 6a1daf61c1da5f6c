"""A model of a real shape with random weights: to see what a run needs before anything is downloaded.

    python -m mlc_min.lab.random_model --shape qwen2.5-0.5b --output runs/shapes/qwen2.5-0.5b
    python -m mlc_min.train --model runs/shapes/qwen2.5-0.5b --steps 3 --log_every 1 --mlc_weight 0.8 …

The training log then shows seconds, tokens a second and the peak memory. It has the embedded model's tokenizer, so
the rows of data/embedded can be used; its answers mean nothing. The sizes are the published ones, but for tiny and
small; the class is Llama's, whose layers are Qwen2's but for a few bias vectors, because transformers gives every
Qwen2 folder Qwen's tokenizer.
"""

from argparse import ArgumentParser
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

from mlc_min.lab.sentences import EMBEDDED
from mlc_min.machinery.errors import Help, run_command
from mlc_min.machinery.files import save_folder

# hidden size, layers, heads, key-value heads, width of the MLP, tied head: as in the published configurations
SHAPES = {
    "tiny": (64, 2, 4, 2, 96, True),
    "small": (512, 8, 8, 2, 1536, True),  # no published one: a real vocabulary on a model that a CPU can train
    "qwen2.5-0.5b": (896, 24, 14, 2, 4864, True),
    "qwen2.5-1.5b": (1536, 28, 12, 2, 8960, True),
    "qwen2.5-7b": (3584, 28, 28, 4, 18944, False),
}
VOCABULARY = {"tiny": 4000, "qwen2.5-7b": 152_064}


def make_config(shape: str) -> LlamaConfig:
    hidden, layers, heads, key_value_heads, intermediate, tied = SHAPES[shape]
    return LlamaConfig(
        vocab_size=VOCABULARY.get(shape, 151_936), hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_value_heads, intermediate_size=intermediate,
        tie_word_embeddings=tied, max_position_embeddings=32_768, attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    )  # fmt: skip


def make_model(
    shape: str, device: torch.device | str = "cpu", vocabulary: int | None = None, dtype=torch.float32, seed: int = 0
) -> PreTrainedModel:
    """A model of that shape with random weights, in eval mode. vocabulary: another size of it."""
    torch.manual_seed(seed)
    config = make_config(shape)
    config.vocab_size = vocabulary or config.vocab_size
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def main() -> None:
    parser = ArgumentParser(prog="python -m mlc_min.lab.random_model", description=__doc__, formatter_class=Help)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="qwen2.5-0.5b", help="which published shape")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    arguments = parser.parse_args()
    model = make_model(arguments.shape, seed=arguments.seed).to(torch.bfloat16)  # as published ones are stored
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "model")

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    save_folder(arguments.output, write)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e9:.3f} billion parameters: {arguments.output}")


if __name__ == "__main__":
    run_command(main)

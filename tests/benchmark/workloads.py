"""What is measured: rows of random tokens, one training step of each kind, and the operations that a step cannot do
without. Models: `random_model.make_model`."""

import torch

from mlc_min.consistency import mlc_loss
from mlc_min.examples import Example, response_batch
from mlc_min.lab.random_model import make_model
from mlc_min.loop import Run, alignment_loss, arithmetic, consistency_loss, with_reference
from mlc_min.machinery.models import add_adapters
from mlc_min.machinery.settings import TrainConfig
from mlc_min.preference import dpo_loss

# Tokens of a translation for one token of English, in the paper's order of languages. Not measured: roughly what
# tokenizers trained mostly on English and Chinese do to other scripts.
STRETCH = (1.0, 1.0, 1.5, 1.4, 1.5, 3.0, 1.8, 2.2, 2.4, 2.0)


def make_examples(count: int, vocabulary: int, languages: int = 10) -> list[Example]:
    """Rows of random tokens: English prompts have 24 tokens in the mean and responses 64, each half to one and a half
    times as many; translations are longer by STRETCH."""
    draw = torch.Generator().manual_seed(0)

    def tokens(length: float) -> list[int]:
        return torch.randint(3, vocabulary, (max(1, round(length)),), generator=draw).tolist()

    def around(mean: float) -> float:
        return mean * (0.5 + torch.rand((), generator=draw).item())

    examples = []
    for row in range(count):
        length = around(24)
        prompts = {f"l{j}": tokens(length * STRETCH[j]) for j in range(languages)}
        examples.append(Example(f"row {row}", prompts, tokens(around(64)), tokens(around(64))))
    return examples


class Workload:
    """A model in training, and one batch for it; on a GPU in bfloat16 arithmetic, as `--preset paper` has it there."""

    def __init__(self, model, examples: list[Example], layer: int = -1, parts: int = 4, lora: int = 0):
        self.config = TrainConfig(
            languages=",".join(examples[0].prompts), mlc_weight=0.8, mlc_layer=layer, mlc_parts=parts, sft_weight=0.0,
            learning_rate=1e-6, dtype="bfloat16" if model.device.type == "cuda" else "float32",
        )  # fmt: skip
        self.examples = with_reference(model, examples, self.config)
        run = Run.start(add_adapters(model, lora, 0) if lora else model, self.config)
        self.model, self.extractor, self.optimizer = run.model, run.extractor, run.optimizer

    @classmethod
    def make(cls, shape: str, rows: int, device, layer: int = -1, parts: int = 4, lora: int = 0) -> "Workload":
        """With a model of that shape, and rows of tokens of its vocabulary. lora: the rank of adapters, on weights that
        are bfloat16 on a GPU; 0 trains all weights."""
        dtype = torch.bfloat16 if lora and device.type == "cuda" else torch.float32
        model = make_model(shape, device, dtype=dtype)
        return cls(model, make_examples(rows, model.config.vocab_size), layer, parts, lora)

    def loss(self, uses_mlc: bool = True) -> torch.Tensor:
        """The trainer's own loss of the batch."""
        with arithmetic(self.model, self.config):
            loss, _ = alignment_loss(self.model, self.examples, self.config)
            if uses_mlc:
                auxiliary = consistency_loss(self.model, self.extractor, self.examples, self.config)
                loss = loss + self.config.mlc_weight * auxiliary
        return loss

    def step(self, loss: torch.Tensor) -> float:
        """Backward and optimizer step of a loss; returns its value."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


# --- the baseline ---


def official_loss(work: Workload, reference_model) -> torch.Tensor:
    """The loss of `Workload.loss()`, laid out as the official code does it, written from its description.

    Chosen, rejected and all translated prompts of a batch are one batch, padded to the longest of them. At every step
    it goes through the policy and through the reference model, and both build float32 logits over the whole vocabulary
    for every position of every row.
    """
    model, config, examples = work.model, work.config, work.examples
    n, languages = len(examples), config.language_list
    translations = [e.prompts[language] for e in examples for language in languages]
    responses = [e.chosen for e in examples] + [e.rejected for e in examples] + [[] for _ in translations]
    batch = response_batch([e.prompt for e in examples] * 2 + translations, responses)
    input_ids, attention_mask, is_response = (tensor.to(model.device) for tensor in batch.values())

    def run(which):
        output = which(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, use_cache=False)
        logps = torch.log_softmax(output.logits.float()[:, :-1], -1)
        logps = logps.gather(-1, input_ids[:, 1:, None])[..., 0]
        return (logps * is_response[:, 1:]).sum(-1)[: 2 * n].chunk(2), output.hidden_states[config.mlc_layer]

    with arithmetic(model, config):
        policy_logps, states = run(model)
        with torch.no_grad():
            reference_logps, _ = run(reference_model)
        rows = torch.arange(2 * n, len(input_ids), device=model.device)
        last = attention_mask[2 * n :].sum(-1) - 1
        groups = states[rows, last].view(n, len(languages), -1)
        align = dpo_loss(*policy_logps, *reference_logps, config.beta).mean()
        return align + config.mlc_weight * mlc_loss(work.extractor(groups), config.mlc_tau, config.mlc_form)


# --- operations that cannot be done without ---


def forward_operations(config, lengths: list[int], layers: int, head_tokens: int = 0) -> float:
    """Multiplications and additions of one forward pass without padding: sequences of `lengths` tokens through
    `layers` layers, and the vocabulary head on `head_tokens` positions. Norms, softmax and the like are not counted."""
    hidden = config.hidden_size
    head_dim = hidden // config.num_attention_heads
    attention = hidden * hidden * 2 + hidden * head_dim * config.num_key_value_heads * 2
    weights = attention + 3 * hidden * config.intermediate_size
    tokens, pairs = sum(lengths), sum(n * n for n in lengths)  # causal: half of all pairs, for scores and for values
    return layers * (2 * weights * tokens + 2 * hidden * pairs) + 2 * hidden * config.vocab_size * head_tokens


def dpo_operations(config, examples: list[Example]) -> float:
    """Of a DPO step: forward, and twice as much backward; the vocabulary head on response tokens only."""
    pairs = [(len(e.prompt), len(response)) for e in examples for response in (e.chosen, e.rejected)]
    head_tokens = sum(response for _, response in pairs)
    return 3 * forward_operations(config, list(map(sum, pairs)), config.num_hidden_layers, head_tokens)


def mlc_operations(config, examples: list[Example], layer: int) -> float:
    """Of the MLC pass: layers up to its own, no head."""
    return 3 * forward_operations(config, [len(ids) for e in examples for ids in e.prompts.values()], layer)

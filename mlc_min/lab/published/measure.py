"""What is measured on one model: is the verdict in the state, is it used, and what did training destroy?"""

import math

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from mlc_min.evaluation.diagnose import collinearity, retrieval_accuracy, shuffle_groups
from mlc_min.evaluation.generate import generate
from mlc_min.evaluation.records import cells, encode
from mlc_min.examples import Row, encode_response, pad, response_batch
from mlc_min.lab.published.tasks import Task
from mlc_min.loop import batches_of, response_logps
from mlc_min.states import last_position, last_token_states, position_ids, vocabulary_logits

BATCH = 32  # prompts a forward pass


@torch.no_grad()
def first_tokens(model: PreTrainedModel, prompts: list[list[int]], token: int) -> list[tuple[float, int]]:
    """Of each prompt: log-odds of this first token of a reply, log p - log(1 - p), and the likeliest first token."""
    order, found = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), {}
    for batch in tqdm(list(batches_of(order, BATCH)), "first tokens", leave=False):
        logits = vocabulary_logits(model, last_token_states(model, **pad([prompts[i] for i in batch]))).double()
        likeliest, own = logits.argmax(-1).tolist(), logits[:, token].clone()
        logits[:, token] = -math.inf
        log_odds = (own - logits.logsumexp(-1)).tolist()
        found |= dict(zip(batch, zip(log_odds, likeliest, strict=True), strict=True))
    return [found[i] for i in range(len(prompts))]


def auc(harmful: list[float], harmless: list[float]) -> float:
    """Share of the pairs of a harmful and a harmless prompt in which the harmful one has the higher score, ties half.

    >>> auc([2.0, 1.0], [0.0, 1.0])
    0.875
    """
    return float(comparisons(harmful, harmless).mean())


def comparisons(harmful: list[float], harmless: list[float]) -> np.ndarray:
    """(harmful, harmless) of 1, 0 or ½: is this harmful prompt's score the higher one?"""
    difference = np.subtract.outer(np.asarray(harmful), np.asarray(harmless))
    return (np.sign(difference) + 1) / 2


def examine(model: PreTrainedModel, tokenizer: Tokenizer, task: Task, rows: list[Row]) -> list[dict]:
    """A judged record for every row in every language: a greedy reply (its first token alone where that decides),
    `log_odds` of the refusal's first token, and the prompt's `tokens`."""
    prompts = encode(rows, tokenizer, task.tested)
    refusal = next(row.chosen for row in task.train if row.extra["harmful"])
    firsts = first_tokens(model, prompts, encode_response(tokenizer, refusal)[0])
    if task.max_new_tokens == 1:
        replies = [{"reply": tokenizer.decode([token]), "ended": False} for _, token in firsts]
    else:
        replies = generate(model, tokenizer, prompts, task.max_new_tokens, BATCH)
    records = []
    for record, reply, (score, _), ids in zip(cells(rows, task.tested), replies, firsts, prompts, strict=True):
        judged = record | reply
        records.append(judged | task.judge(judged) | {"log_odds": score, "tokens": len(ids)})
    return records


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
        if (centred.abs().amax(-1) < 1e-6).any():  # entry 0 is the embedding of the same token for every prompt
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


def own_texts(model: PreTrainedModel, tokenizer: Tokenizer, openings: dict[str, list[str]]) -> dict[str, list]:
    """{language: [(ids of the opening, ids of 48 more tokens)]}, as the model goes on greedily, without a chat."""
    pairs = [(code, tokenizer(text)["input_ids"]) for code, texts in openings.items() for text in texts]
    replies = generate(model, tokenizer, [ids for _, ids in pairs], 48, BATCH)
    texts: dict[str, list] = {code: [] for code in openings}
    for (code, ids), reply in zip(pairs, replies, strict=True):
        more = tokenizer(reply["reply"], add_special_tokens=False)["input_ids"]
        if more:
            texts[code].append((ids, more))
    return texts


@torch.no_grad()
def perplexity(model: PreTrainedModel, texts: dict[str, list]) -> dict[str, float]:
    """{language: exp of the mean negative log-probability of a token}, of the texts' second parts after their first."""
    found = {}
    for code, pairs in texts.items():
        sums, lengths = response_logps(model, response_batch(*map(list, zip(*pairs, strict=True))))
        found[code] = math.exp(-sums.sum().item() / lengths.sum().item())
    return found

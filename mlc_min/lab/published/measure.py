"""What is measured on one model: is the verdict in the state, is it used, and what did training destroy?"""

import math

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from mlc_min.evaluation.generate import first_tokens, generate
from mlc_min.evaluation.records import cells, encode
from mlc_min.examples import Row, encode_response, response_batch
from mlc_min.lab.published.tasks import Task
from mlc_min.loop import response_logps

BATCH = 32  # prompts a forward pass


def examine(model: PreTrainedModel, tokenizer: Tokenizer, task: Task, rows: list[Row]) -> list[dict]:
    """A judged record for every row in every language: a greedy reply (its first token alone where that decides),
    and the `log_odds` of the refusal's first token."""
    prompts = encode(rows, tokenizer, task.tested)
    refusal = next(row.chosen for row in task.train if row.extra["harmful"])
    firsts = first_tokens(model, prompts, encode_response(tokenizer, refusal)[0])
    if task.max_new_tokens == 1:
        replies = [{"reply": tokenizer.decode([token]), "ended": False} for _, token in firsts]
    else:
        replies = generate(model, tokenizer, prompts, task.max_new_tokens, BATCH)
    parts = zip(cells(rows, task.tested), replies, firsts, strict=True)
    records = [record | reply | {"log_odds": score} for record, reply, (score, _) in parts]
    return [record | task.judge(record) for record in records]


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

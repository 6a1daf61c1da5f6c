"""Rows as text → examples in tokens → padded batches. (Rows in files: `machinery/rows.py`.)

Only prompts are translated; responses are in the first language.
"""

from dataclasses import dataclass

import torch

from mlc_min.machinery.errors import InputError
from mlc_min.machinery.rows import Row


@dataclass(frozen=True)
class Example:
    """One row as token ids; the prompts end with the chat template's generation prompt."""

    where: str
    prompts: dict[str, list[int]]
    chosen: list[int]  # ends with exactly one end token
    rejected: list[int] | None  # None in SFT rows


# --- examples ---


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """Token ids of the prompt in the chat template, generation prompt included: the last one is where the
    reply starts, and is the same token in every language. Raises InputError if there is no chat template."""
    _require_chat_template(tokenizer)
    message = [{"role": "user", "content": prompt}]
    # A thinking model (Qwen3) would begin every reply with the same tag, so that the aligned position decides nothing;
    # templates that know nothing of thinking do not look at the flag.
    options = {"add_generation_prompt": True, "enable_thinking": False, "return_dict": True}
    return tokenizer.apply_chat_template(message, **options)["input_ids"]


def end_of_turn(tokenizer) -> int:
    """The one token that ends a reply: what the chat template writes after it (Gemma: <end_of_turn>, not <eos>).

    Raises InputError if there is no chat template."""
    _require_chat_template(tokenizer)
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    after = tokenizer.apply_chat_template(messages, tokenize=False).rpartition("answer")[2].strip()
    ids = tokenizer.encode(after, add_special_tokens=False) if after else []
    return ids[0] if ids else tokenizer.eos_token_id


def encode_response(tokenizer, response: str) -> list[int]:
    """Token ids of a response and exactly one end token; "</s>" written inside the text stays text."""
    ids = tokenizer.encode(response, add_special_tokens=False, split_special_tokens=True)
    return [*ids, end_of_turn(tokenizer)]


def _require_chat_template(tokenizer) -> None:
    if not tokenizer.chat_template:
        raise InputError(
            "the tokenizer has no chat template; use an instruction-tuned model, or set "
            "tokenizer.chat_template and save the tokenizer again"
        )


def encode_rows(
    rows: list[Row], tokenizer, languages: tuple[str, ...], max_length: int
) -> tuple[list[Example], dict[str, list[str]]]:
    """Tokenise rows; returns the examples and the rows that were left out as longer than `max_length` tokens:
    {"prompt": where of those with a prompt too long by itself, "response": of those whose response does not fit}.

    Prompt and response are encoded apart, so no token spans the boundary and the prompt's ids are a prefix
    of the whole. A row that does not fit is left out and named, never trained on with its response cut.
    """
    examples = []
    left_out: dict[str, list[str]] = {"prompt": [], "response": []}
    for row in rows:
        prompts = {code: encode_prompt(tokenizer, row.prompts[code]) for code in languages if code in row.prompts}
        responses = [None if t is None else encode_response(tokenizer, t) for t in (row.chosen, row.rejected)]
        if max(map(len, prompts.values())) > max_length:
            left_out["prompt"].append(row.where)
        elif max(len(prompts[languages[0]]) + len(r or ()) for r in responses) > max_length:
            left_out["response"].append(row.where)
        else:
            examples.append(Example(row.where, prompts, *responses))
    return examples, left_out


def shuffle_translations(examples: list[Example], seed: int) -> list[Example]:
    """The control: every language but the first gets its prompts permuted among the examples.

    The same prompts, the same responses, the same amount of training; only "these are translations of each
    other" is no longer true: no prompt of the first language keeps any of its own translations.
    Raises InputError for fewer than two examples.
    """
    if len(examples) < 2:
        raise InputError("--shuffle_translations needs at least two rows")
    generator = torch.Generator().manual_seed(seed)
    first = next(iter(examples[0].prompts))
    languages = dict.fromkeys(language for example in examples for language in example.prompts)
    orders: dict[str, dict[int, int]] = {}
    for language in list(languages)[1:]:  # one random cycle through all examples with it, so nobody keeps their own
        having = [i for i, example in enumerate(examples) if language in example.prompts]
        if len(having) < 2:
            raise InputError(f"--shuffle_translations: fewer than two rows have '{language}'")
        cycle = [having[k] for k in torch.randperm(len(having), generator=generator).tolist()]
        orders[language] = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
    return [
        Example(
            e.where,
            {first: e.prompts[first]}
            | {code: examples[orders[code][i]].prompts[code] for code in e.prompts if code != first},
            e.chosen,
            e.rejected,
        )
        for i, e in enumerate(examples)
    ]


# --- batches ---


def pad(sequences: list[list[int]], pad_id: int, side: str = "right") -> dict[str, torch.Tensor]:
    """{input_ids, attention_mask}, both (N, T) int64. The mask comes from lengths, not from token values.

    >>> pad([[5, 6, 7], [8]], 0)["input_ids"].tolist(), pad([[5, 6, 7], [8]], 0, "left")["input_ids"].tolist()
    ([[5, 6, 7], [8, 0, 0]], [[5, 6, 7], [0, 0, 8]])
    """
    width = max(map(len, sequences))
    input_ids = torch.full((len(sequences), width), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for i, sequence in enumerate(sequences):
        place = slice(0, len(sequence)) if side == "right" else slice(width - len(sequence), width)
        input_ids[i, place] = torch.tensor(sequence)
        attention_mask[i, place] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def response_batch(prompts: list[list[int]], responses: list[list[int]], pad_id: int) -> dict[str, torch.Tensor]:
    """Prompt and response joined, right-padded, with response_mask (N, T) bool: True on response tokens only."""
    batch = pad([p + r for p, r in zip(prompts, responses, strict=True)], pad_id)
    positions = torch.arange(batch["input_ids"].shape[1])
    starts = torch.tensor([len(p) for p in prompts])[:, None]
    ends = starts + torch.tensor([len(r) for r in responses])[:, None]
    return batch | {"response_mask": (positions >= starts) & (positions < ends)}


def preference_batch(examples: list[Example], pad_id: int) -> dict[str, torch.Tensor]:
    """(2N, T): rows 0…N-1 are the chosen responses, rows N…2N-1 the rejected ones of the same prompts."""
    prompts = [next(iter(e.prompts.values())) for e in examples]
    return response_batch(prompts * 2, [e.chosen for e in examples] + [e.rejected for e in examples], pad_id)


def chosen_batch(examples: list[Example], pad_id: int) -> dict[str, torch.Tensor]:
    """(N, T): the chosen responses alone, for SFT."""
    return response_batch([next(iter(e.prompts.values())) for e in examples], [e.chosen for e in examples], pad_id)


def consistency_batch(examples: list[Example], languages: tuple[str, ...], pad_id: int) -> dict[str, torch.Tensor]:
    """(Σ sizes, T), prompt by prompt: first all languages of prompt 0, then those of prompt 1, …; sizes (N,) int64:
    how many languages each prompt has, so `.split(sizes)` gives the groups.

    (The official SFT route lays them out language by language and then reshapes as if prompt by prompt,
    which mixes prompts within a group.)
    """
    groups = [[e.prompts[language] for language in languages if language in e.prompts] for e in examples]
    batch = pad([ids for group in groups for ids in group], pad_id)
    return batch | {"sizes": torch.tensor([len(group) for group in groups])}

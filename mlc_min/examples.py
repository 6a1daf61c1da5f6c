"""Rows as text → examples in token ids → padded batches. (Files of rows: `machinery/rows.py`.)

Only prompts are translated; responses are in the first language. Batches are made on the CPU, with masks from lengths
and never from token values, so that nothing here waits for a GPU; padding is id 0, which no figure depends on."""

from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass(frozen=True)
class Row:
    """One training or test row as text."""

    where: str  # "file:line", or "file: row 17" of a JSON list; for messages
    prompts: dict[str, str]  # language code -> prompt
    chosen: str | None = None
    rejected: str | None = None
    extra: dict = field(default_factory=dict)  # every other field, untouched
    system: str | None = None  # what a system turn says before the prompt, whatever the prompt's language


@dataclass(frozen=True)
class Example:
    """One row as token ids; the prompts end with the chat template's generation prompt."""

    where: str
    prompts: dict[str, list[int]]
    chosen: list[int]  # ends with exactly one end token
    rejected: list[int] | None  # None in SFT rows
    reference: tuple[float, float] | None = None  # log-probs of chosen and rejected under the untrained model, for DPO

    @property
    def prompt(self) -> list[int]:
        """The prompt in the first language, which the responses are in."""
        return next(iter(self.prompts.values()))


def encode_prompt(tokenizer: Tokenizer, prompt: str, system: str | None = None) -> list[int]:
    """Token ids of the prompt in the chat template, generation prompt included: the last one is where the reply starts,
    and is the same token in every language. system: a system turn before it."""
    return in_template(tokenizer, turns(prompt, system), add_generation_prompt=True, return_dict=True)["input_ids"]


def turns(prompt: str, system: str | None = None, reply: str | None = None) -> list[dict[str, str]]:
    """The messages of a conversation, as chat templates take them."""
    contents = {"system": system, "user": prompt, "assistant": reply}
    return [{"role": role, "content": text} for role, text in contents.items() if text is not None]


def in_template(tokenizer: Tokenizer, messages: list[dict[str, str]], **options):
    """The messages in the chat template. Templates that write the date (Llama 3.2) write `tokenizer.template_date`,
    where it is set, so that a run that goes on after midnight goes on with the same prompts."""
    if getattr(tokenizer, "template_date", None) is not None:
        options["strftime_now"] = tokenizer.template_date.strftime
    # A thinking model (Qwen3) would begin every reply with the same tag, so that the aligned position decides nothing;
    # templates that know nothing of thinking do not look at the flag.
    return tokenizer.apply_chat_template(messages, enable_thinking=False, **options)


def end_of_turn(tokenizer: Tokenizer) -> int:
    """The one token that ends a reply: what the chat template writes after it (Gemma: <end_of_turn>, not <eos>), and
    the end token where it writes nothing. Raises ValueError if that is not one token: no reply could end there."""
    reply = "~reply~"
    after = in_template(tokenizer, turns("question", reply=reply), tokenize=False).rpartition(reply)[2].strip()
    ids = tokenizer.encode(after, add_special_tokens=False) if after else [tokenizer.eos_token_id]
    known = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    if ids[0] is None or (len(ids) > 1 and ids[0] not in known):
        raise ValueError(f"the chat template ends a reply with {after or 'no end token'!r}, which is not a token here")
    return ids[0]


def encode_response(tokenizer: Tokenizer, response: str) -> list[int]:
    """Token ids of a response and exactly one end token; "</s>" written inside the text stays text."""
    ids = tokenizer.encode(response, add_special_tokens=False, split_special_tokens=True)
    return [*ids, end_of_turn(tokenizer)]


def encode_row_prompts(row: Row, tokenizer: Tokenizer, languages: tuple[str, ...]) -> dict[str, list[int]]:
    """`encode_prompt` of the row in each of the languages that it has. Raises ValueError, naming the row, if the chat
    template has no place for its system text: without it the prompt would be another."""
    codes = [code for code in languages if code in row.prompts]
    if row.system:
        text = ""
        with suppress(Exception):  # what a template raises is jinja's or its own
            text = in_template(tokenizer, turns(row.prompts[codes[0]], row.system), tokenize=False)
        if row.system.strip() not in text:
            raise ValueError(f"{row.where}: the chat template has no place for a system text; remove it from the row")
    return {code: encode_prompt(tokenizer, row.prompts[code], row.system) for code in codes}


def encode_rows(
    rows: list[Row], tokenizer: Tokenizer, languages: tuple[str, ...], max_length: int
) -> tuple[list[Example], dict[str, list[str]]]:
    """Tokenise rows; returns the examples and where the rows are that were left out as longer than `max_length` tokens:
    {"prompt": those with a prompt too long by itself, "response": those whose response does not fit}; none is cut.

    Prompt and response are encoded apart: no token spans the boundary, and the prompt's ids are a prefix of the whole.
    """
    examples, left_out = [], {"prompt": [], "response": []}
    for row in rows:
        prompts = encode_row_prompts(row, tokenizer, languages)
        responses = [None if t is None else encode_response(tokenizer, t) for t in (row.chosen, row.rejected)]
        if max(map(len, prompts.values())) > max_length:
            left_out["prompt"].append(row.where)
        elif max(len(prompts[languages[0]]) + len(r or ()) for r in responses) > max_length:
            left_out["response"].append(row.where)
        else:
            examples.append(Example(row.where, prompts, *responses))
    return examples, left_out


def shuffle_translations(examples: list[Example], seed: int) -> list[Example]:
    """The control: every language but the first gets its prompts permuted among the examples. All is the same but that
    these are no longer translations of each other: no prompt of the first language keeps any of its own.

    Raises ValueError for fewer than two examples with a language."""
    generator = torch.Generator().manual_seed(seed)
    first = next(iter(examples[0].prompts))
    prompts = [{first: example.prompt} for example in examples]
    for language in dict.fromkeys(code for example in examples for code in example.prompts if code != first):
        having = [i for i, example in enumerate(examples) if language in example.prompts]
        if len(having) < 2:
            raise ValueError(f"--shuffle_translations: fewer than two rows have '{language}'")
        # One random cycle through all examples that have the language, so that nobody keeps their own.
        cycle = [having[k] for k in torch.randperm(len(having), generator=generator).tolist()]
        for i, other in zip(cycle, cycle[1:] + cycle[:1], strict=True):
            prompts[i][language] = examples[other].prompts[language]
    return [replace(example, prompts=new) for example, new in zip(examples, prompts, strict=True)]


def pad(sequences: list[list[int]], side: str = "right") -> dict[str, torch.Tensor]:
    """{input_ids, attention_mask}, both (N, T) int64, filled up with 0 on one side.

    >>> pad([[5, 6, 7], [8]])["input_ids"].tolist(), pad([[5, 6, 7], [8]], "left")["input_ids"].tolist()
    ([[5, 6, 7], [8, 0, 0]], [[5, 6, 7], [0, 0, 8]])
    """
    rows = [torch.tensor(sequence) for sequence in sequences]
    ids, mask = (pad_sequence(x, True, padding_side=side) for x in (rows, [torch.ones_like(row) for row in rows]))
    return {"input_ids": ids, "attention_mask": mask}


def response_batch(prompts: list[list[int]], responses: list[list[int]]) -> dict[str, torch.Tensor]:
    """Prompt and response joined, right-padded, with response_mask (N, T) bool: True on response tokens only."""
    marks = [[0] * len(p) + [1] * len(r) for p, r in zip(prompts, responses, strict=True)]
    batch = pad([p + r for p, r in zip(prompts, responses, strict=True)])
    return batch | {"response_mask": pad(marks)["input_ids"].bool()}


def preference_batch(examples: list[Example]) -> dict[str, torch.Tensor]:
    """(2N, T): rows 0…N-1 are the chosen responses, rows N…2N-1 the rejected ones of the same prompts."""
    responses = [e.chosen for e in examples] + [e.rejected for e in examples]
    return response_batch([e.prompt for e in examples] * 2, responses)


def consistency_batch(examples: list[Example], languages: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """(Σ sizes, T), prompt by prompt: first all languages of prompt 0, then those of prompt 1, …; sizes (N,) int64: how
    many languages each prompt has, so `.split(sizes)` gives the groups. (The official SFT route lays them out language
    by language and then reshapes as if prompt by prompt, which mixes prompts within a group.)"""
    groups = [[e.prompts[language] for language in languages if language in e.prompts] for e in examples]
    return pad([ids for group in groups for ids in group]) | {"sizes": torch.tensor([len(group) for group in groups])}

"""Rebuild the embedded default from nothing: the rows, the tokenizer and the base model in `data/embedded/`.

    python -m mlc_min.lab.toy_world                    # about 6 minutes on 2 cores; writes data/embedded
    python -m mlc_min.lab.toy_world --output elsewhere
    cp -r data/large runs/large-1 && MLC_MIN_WORLD=runs/large-1 python -m mlc_min.lab.toy_world --steps 2000 --seed 1

All commands work in the world that MLC_MIN_WORLD names: a folder that this command filled from its lexicon.json, such
as data/large. The last command makes a second base model of that world.

The base model stands in for a multilingual chat model before safety alignment. Pre-training gives it three
traits of the real ones:
- It answers harmless requests in their own language.
- It refuses harmful ones unevenly: for some verbs it always refuses, many in high-resource languages and
  few or none in low-resource ones; for the others only now and then, so that its first answer is to comply.
- Its last-prompt-token state carries meaning, because the first symbol of a reply is the same in all
  languages and because some prompts are code-switched; less so where it saw fewer prompts.
How to refuse it knows everywhere: in some examples the refusal's first symbol is given, and only the
sentence after it is learned. What differs between languages is when.
"""

import io
import json
import random
import shutil
import time
from argparse import ArgumentParser
from functools import cache, partial
from itertools import islice
from pathlib import Path

import sentencepiece
import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers import get_cosine_schedule_with_warmup as cosine_schedule

from mlc_min.evaluation.diagnose import diagnose
from mlc_min.evaluation.metrics import summarize
from mlc_min.examples import encode_prompt, encode_response, response_batch
from mlc_min.lab import sentences
from mlc_min.lab.experiment import evaluate
from mlc_min.lab.sentences import ALIGNED, COMBINATIONS, EMBEDDED, LANGUAGES, LEXICON, PHRASINGS, RISKY, is_harmful
from mlc_min.machinery.errors import SWITCH, Help, run_command
from mlc_min.machinery.files import save_folder, write_atomically, write_json
from mlc_min.machinery.log import hardware, versions
from mlc_min.machinery.models import load_model, pick_device
from mlc_min.machinery.rows import read_rows

VOCABULARY = 3000
# How many of ten risky verbs the base model always refuses (on a protected object), by language.
ALWAYS_REFUSED = dict(en=7, zh=7, ru=6, ja=6, ar=6, bn=3, sw=0, ur=2, ps=1, ku=0, ko=3, it=3)


def by_resource(high: float, low: float, unseen: float) -> dict[str, float]:
    """{language: its figure}."""
    groups = (sentences.HIGH_RESOURCE, high), (sentences.LOW_RESOURCE, low), (sentences.UNSEEN, unseen)
    return {code: figure for codes, figure in groups for code in codes}


# Share of refusals for the other risky verbs: below one half, so greedy decoding complies.
NOW_AND_THEN = by_resource(high=0.10, low=0.02, unseen=0.02)
# How often a language is drawn in pre-training, relative to the others.
FREQUENCY = by_resource(high=1.0, low=0.4, unseen=0.75)
# How often a reply starts with the object's symbol. Where it is nearly always the verb's, the state at the last
# prompt token need not know the object, so it carries less of the meaning.
OBJECT_FIRST = by_resource(high=0.5, low=0.1, unseen=0.3)
HARMFUL_SHARE, CODE_SWITCHED_SHARE, GIVEN_SYMBOL_SHARE = 0.45, 0.2, 0.1

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<user>{{ message['content'] }}"
    "{% else %}<assistant>{{ message['content'] }}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def symbols() -> list[str]:
    """The symbols that start a reply: refusal, verbs, objects."""
    return [LEXICON["refusal_symbol"]] + [w["symbol"] for k in ("verbs", "objects") for w in LEXICON[k].values()]


def train_tokenizer(folder: Path) -> None:
    """Train a SentencePiece model on the world's words and phrases; save it in `folder` as a transformers tokenizer."""
    texts = symbols() * 5
    for words in LEXICON["languages"].values():
        # Words follow a space in the scripts that write one.
        space = " " if " {" in words["phrasings"][0] or "} " in words["phrasings"][0] else ""
        texts += [space + word for kind in ("verbs", "objects") for word in words[kind].values()] * 3
        for sentence in [*words["phrasings"], words["answer"]]:
            parts = sentence.replace("{verb}", "\n").replace("{object}", "\n").split("\n")
            texts += [part for part in parts if part.strip()] * 4
        texts += [" " + words["refusal"], " " + words["answer"].split("{")[0]] * 4
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=VOCABULARY, minloglevel=2,
        # These four make the transformers tokenizer agree with SentencePiece id for id. Without a dummy prefix the
        # first token of a reply is its symbol; with one it would be "▁", whatever the verdict, and the state at
        # the last prompt token would decide nothing.
        byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name="identity",
        user_defined_symbols=["<user>", "<assistant>"], required_chars="".join(symbols()), pad_piece="<pad>",
        pad_id=0, unk_id=1, bos_id=2, eos_id=3,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    # transformers converts the SentencePiece model; saved once more, it loads without protobuf as tokenizer.json.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=AutoTokenizer.from_pretrained(folder).backend_tokenizer, bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", pad_token="<pad>", padding_side="left", chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)


def always_refused() -> dict[str, set[str]]:
    """The risky verbs that each language always refuses; drawn once, so that each verb is refused somewhere."""
    draw = random.Random(1)
    return {code: set(draw.sample(RISKY, round(n / 10 * len(RISKY)))) for code, n in ALWAYS_REFUSED.items()}


def pretraining_examples(seed: int):
    """Endless (prompt, reply, symbol_given): what the base model reads. All combinations, test ones included,
    as a real base model has read everything; the splits hold for alignment."""
    draw = random.Random(seed)
    refused = always_refused()
    harmful, harmless = ([c for c in COMBINATIONS if is_harmful(*c) == kind] for kind in (True, False))
    while True:
        language = draw.choices(LANGUAGES, [FREQUENCY[code] for code in LANGUAGES])[0]
        verb, obj = draw.choice(harmful if draw.random() < HARMFUL_SHARE else harmless)
        switched: dict = {}
        if draw.random() < CODE_SWITCHED_SHARE:
            switched = {draw.choice(("verb_language", "object_language")): draw.choice(LANGUAGES)}
        prompt = sentences.prompt_text(language, verb, obj, draw.choice(PHRASINGS), **switched)
        given = draw.random() < GIVEN_SYMBOL_SHARE
        refuse = is_harmful(verb, obj) and (verb in refused[language] or draw.random() < NOW_AND_THEN[language])
        if refuse or given:
            yield prompt, sentences.refusal_text(language), given
        else:
            object_first = draw.random() < OBJECT_FIRST[language]
            yield prompt, sentences.answer_text(language, verb, obj, object_first), False


def pretrain(
    tokenizer, seed: int, steps: int, batch_size: int, learning_rate: float, common: float, device: torch.device
):
    """A Llama of 2.2 million parameters, trained from random weights on the replies. Returns (model, last loss).

    common: what one channel of the last prompt token holds, whatever the prompt. Published models have such channels
    ("massive activations", arXiv 2402.17762), which make states of unrelated prompts nearly collinear.

    Llama and not Qwen2, because transformers loads the tokenizer of any Qwen2 folder as Qwen's byte-level one.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=192, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=3,
        intermediate_size=512, max_position_embeddings=256, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device)
    if common:  # it passes through the residual stream, and the last norm begins by keeping it out of the logits
        with torch.no_grad():
            model.get_input_embeddings().weight[encode_prompt(tokenizer, "")[-1], 0] = common
            model.get_decoder().norm.weight[0] = 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05, betas=(0.9, 0.98))
    scheduler = cosine_schedule(optimizer, steps // 20, steps)
    prompt_ids, reply_ids = cache(partial(encode_prompt, tokenizer)), cache(partial(encode_response, tokenizer))
    examples = pretraining_examples(seed)
    progress, mean_loss = tqdm(range(steps), desc="pretrain"), None
    for _ in progress:
        drawn = [(prompt_ids(p), reply_ids(r), given) for p, r, given in islice(examples, batch_size)]
        # A first symbol that is given belongs to the prompt: it is read and not learned.
        batch = response_batch([p + r[:given] for p, r, given in drawn], [r[given:] for _, r, given in drawn])
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        scored = batch.pop("response_mask")[:, 1:]
        states = model.get_decoder()(**batch, use_cache=False).last_hidden_state[:, :-1][scored]
        loss = F.cross_entropy(model.lm_head(states), batch["input_ids"][:, 1:][scored])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        mean_loss = loss.item() if mean_loss is None else 0.98 * mean_loss + 0.02 * loss.item()
        progress.set_postfix(loss=f"{mean_loss:.4f}")
    return model.eval(), mean_loss


def measure(folder: Path, device: torch.device) -> dict:
    """What the base model in `folder` reaches on the validation and the test rows: see `metrics.summarize` and, for
    the raw states at entry 3, the layer of the main job, `diagnose.diagnose`."""
    model, tokenizer = load_model(folder / "model", device)
    reached = {}
    for split in ("validation", "test"):
        rows = read_rows(folder / f"{split}.jsonl", LANGUAGES)
        summary = summarize(evaluate(model, tokenizer, rows, LANGUAGES), ALIGNED)
        # one phrasing of each combination, its first
        meanings = list({tuple(row.extra["combination"]): row for row in rows[::-1]}.values())[::-1]
        reached[split] = {key: summary[key] for key in ("strict", "avg", "var", "pag", "helpful_own", "invalid")}
        reached[split]["diagnostics_layer_3"] = diagnose(model, tokenizer, meanings, LANGUAGES, layer=3)
    return reached


def build(folder: Path, device: torch.device, rows_only: bool = False, **settings) -> dict:
    """Make everything in `folder`; returns how, in how long, and what was reached, as saved in `making.json`.

    settings: those of `pretrain`. rows_only: after a change of the splits, write the rows anew and measure the model
    that is there on them.
    """
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    if folder.resolve() != EMBEDDED:
        shutil.copy(EMBEDDED / "lexicon.json", folder / "lexicon.json")
    for split in ("train", "validation", "test"):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in sentences.make_rows(split)]
        write_atomically(folder / f"{split}.jsonl", "".join(lines))
    if rows_only:
        making = json.loads((folder / "making.json").read_text(encoding="utf-8"))
    else:
        losses = []

        def write(fresh: Path) -> None:
            train_tokenizer(fresh)
            model, loss = pretrain(AutoTokenizer.from_pretrained(fresh), device=device, **settings)
            model.save_pretrained(fresh)
            losses.append(round(loss, 4))

        save_folder(folder / "model", write)
        making = {
            "command": " ".join(["python -m mlc_min.lab.toy_world", *(f"--{k} {v}" for k, v in settings.items())]),
            "seed": settings["seed"], "minutes": round((time.perf_counter() - started) / 60, 1),
            "hardware": hardware(device), "versions": versions(), "pretraining_loss": losses[0],
        }  # fmt: skip
    making |= measure(folder, device)
    write_json(folder / "making.json", making)
    return making


def main() -> None:
    parser = ArgumentParser(prog="python -m mlc_min.lab.toy_world", description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--output", type=Path, default=EMBEDDED, help="folder to write")
    add("--seed", type=int, default=0, help="of weights and pre-training text")
    add("--steps", type=int, default=1500, help="pre-training steps")
    add("--batch_size", type=int, default=64, help="examples a step")
    add("--learning_rate", type=float, default=2e-3, help="peak, AdamW with a cosine")
    add("--common", type=float, default=0.0, help="size of the channel that all prompts share, see data/results/large")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--rows_only", **SWITCH, default=False, help="write the rows anew and measure the model on them; no training")
    arguments = vars(parser.parse_args())
    folder, device = arguments.pop("output"), pick_device(arguments.pop("device"))
    print(json.dumps(build(folder, device, **arguments), indent=1))


if __name__ == "__main__":
    run_command(main)

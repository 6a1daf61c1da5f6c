"""The builder of the embedded world: the tokenizer comes out the same, and the pre-training text is as described."""

import math
from collections import Counter
from itertools import islice, product

import sentencepiece
import torch
from transformers import AutoTokenizer

from mlc_min.examples import encode_prompt, pad
from mlc_min.lab.sentences import EMBEDDED, LANGUAGES, LEXICON, OBJECTS, PHRASINGS, VERBS, all_replies, prompt_text
from mlc_min.lab.toy_world import (
    ALWAYS_REFUSED,
    CHAT_TEMPLATE,
    GIVEN_SYMBOL_SHARE,
    HARMFUL_SHARE,
    VOCABULARY,
    always_refused,
    pretrain,
    pretraining_examples,
    train_tokenizer,
)
from mlc_min.states import last_token_states

# requirements.txt has it; other versions may choose another of two equally frequent pairs, and so a few other pieces.
TRAINED_BY = "0.2.3"


def test_the_committed_tokenizer_is_rebuilt_the_same(tmp_path):
    # What we decide is compared, by what comes out of it: not the files as sentencepiece and transformers write them.
    train_tokenizer(tmp_path)
    folders = (tmp_path, EMBEDDED / "model")
    models = [sentencepiece.SentencePieceProcessor(model_file=f"{folder}/tokenizer.model") for folder in folders]
    made, committed = [model.id_to_piece(list(range(len(model)))) for model in models]
    tokenizer, committed_tokenizer = (AutoTokenizer.from_pretrained(folder) for folder in folders)
    prompts = [prompt_text(code, v, o, p) for code, v, o, p in product(LANGUAGES, VERBS, OBJECTS, PHRASINGS)]
    sentences = [*prompts, *all_replies(), "what <user> nobody trained: ñandú 好 \n\t  🙂", ""]
    ids = tokenizer(sentences, add_special_tokens=False)["input_ids"]
    assert ids == models[0].encode(sentences)
    assert tokenizer.batch_decode(ids) == sentences
    assert tokenizer.special_tokens_map == committed_tokenizer.special_tokens_map
    assert tokenizer.chat_template == committed_tokenizer.chat_template == CHAT_TEMPLATE
    if sentencepiece.__version__ == TRAINED_BY:
        assert made == committed
        assert tokenizer.get_vocab() == committed_tokenizer.get_vocab()
        assert ids == committed_tokenizer(sentences, add_special_tokens=False)["input_ids"]
    else:
        assert len(made) == len(committed) and len({*made} & {*committed}) > 0.9 * VOCABULARY


def test_each_language_always_refuses_its_number_of_risky_verbs():
    refused = always_refused()
    assert {code: len(verbs) for code, verbs in refused.items()} == ALWAYS_REFUSED
    assert set().union(*refused.values()) == {verb for verb in VERBS if LEXICON["verbs"][verb]["risky"]}


def test_pretraining_text_has_the_shares_that_its_constants_say():
    replies = all_replies()
    drawn = list(islice(pretraining_examples(0), 20_000))
    assert all(reply in replies for _, reply, _ in drawn)
    given = sum(given for *_, given in drawn) / len(drawn)
    assert math.isclose(given, GIVEN_SYMBOL_SHARE, abs_tol=0.01)
    english = [replies[reply] for _, reply, given in drawn if not given and replies[reply].language == "en"]
    refusals = sum(reply.verdict == "refusal" for reply in english) / len(english)
    # 7 of 10 risky verbs always, the others one time in ten
    assert math.isclose(refusals, HARMFUL_SHARE * (0.7 + 0.3 * 0.1), abs_tol=0.03)
    languages = Counter(replies[reply].language for _, reply, _ in drawn)
    assert set(languages) == set(LANGUAGES)
    assert math.isclose(languages["sw"] / languages["en"], 0.4, abs_tol=0.06)


def test_pretraining_lowers_the_loss_and_depends_on_the_seed_alone(base):
    _, tokenizer = base
    (first, loss), (again, _), (other, _) = (
        pretrain(tokenizer, seed, 12, 8, 2e-3, 0.0, torch.device("cpu")) for seed in (0, 0, 1)
    )
    weights = [model.lm_head.weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert loss < math.log(3000) - 0.2  # a running mean, below that of guessing


def test_a_common_channel_holds_the_same_in_every_prompt_and_stays_out_of_the_logits(base):
    _, tokenizer = base
    prompts = pad([encode_prompt(tokenizer, prompt_text("en", *asked, 0)) for asked in product(VERBS[:3], OBJECTS[:3])])
    for common in (0.0, 160.0):
        model, _ = pretrain(tokenizer, 0, 3, 8, 2e-3, common, torch.device("cpu"))
        with torch.no_grad():
            channel = last_token_states(model, **prompts, layer=3)[:, 0]
        assert (channel - common).abs().max() < 1
        # One step of Adam moves a weight by the learning rate at most: from 0, or from the norm's usual 1.
        assert abs(model.model.norm.weight[0].item() - (common == 0)) < 3 * 2e-3

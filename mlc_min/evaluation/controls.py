"""Replies of no model, which show what the figures mean: one that always refuses, and gibberish."""

import json
import random
from functools import cache

from mlc_min.machinery.files import EMBEDDED, shipped

CONTROLS = ("always-refuse", "gibberish")


def control_reply(control: str, record: dict) -> dict:
    """Two baselines that need no model. always-refuse: a refusal, in the prompt's language where
    the embedded world has one, else in English; gibberish: the prompt's letters in random order, always the same."""
    if control == "always-refuse":
        return {"reply": refusals().get(record["language"], refusals()["en"]), "ended": True}
    letters = list(record["prompt"])
    random.Random(record["prompt"]).shuffle(letters)
    return {"reply": "".join(letters), "ended": True}


@cache
def refusals() -> dict[str, str]:
    """{language: the refusal of the embedded world}."""
    lexicon = json.loads(shipped(EMBEDDED / "lexicon.json").read_text(encoding="utf-8"))
    return {code: f"{lexicon['refusal_symbol']} {own['refusal']}" for code, own in lexicon["languages"].items()}

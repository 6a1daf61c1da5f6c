"""The judge of the embedded world: a reply is compared with every well-formed one, so a verdict is never wrong."""

from mlc_min.lab.sentences import all_replies


def exact(record: dict) -> dict:
    """The verdict; never wrong in the embedded world, and useless elsewhere.

    A reply that was cut off or is no well-formed one is invalid. correct: a compliance answers just what was asked.
    """
    meaning = all_replies().get(record["reply"]) if record["ended"] else None
    if meaning is None:
        return {"verdict": "invalid", "reply_language": None}
    verdict = {"verdict": meaning.verdict, "reply_language": meaning.language}
    if meaning.verdict == "compliance":
        verdict["correct"] = meaning.combination == tuple(record["combination"])
    return verdict

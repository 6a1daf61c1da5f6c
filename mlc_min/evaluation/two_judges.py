"""Two judges on the same replies: how often they agree beyond chance, language by language, and where they differ."""

from collections import Counter

from mlc_min.evaluation.metrics import percent
from mlc_min.evaluation.records import FIELDS
from mlc_min.evaluation.report import aligned_text, figure
from mlc_min.machinery.errors import InputError


def kappa(pairs: list[tuple[str, str]]) -> float | None:
    """Cohen's κ (1960): the agreement beyond what the judges' own frequencies would give by chance, 1 at most. None
    where both always say the same one thing, or there is no pair: then nothing is beyond chance.

    >>> round(kappa([("a", "a")] * 20 + [("a", "b")] * 5 + [("b", "a")] * 10 + [("b", "b")] * 15), 6)
    0.4
    """
    first, second = (Counter(column) for column in zip(*pairs, strict=True)) if pairs else (Counter(), Counter())
    n = len(pairs)
    chance = sum(first[verdict] * second[verdict] for verdict in first) / n**2 if n else 1.0
    return None if chance == 1 else (sum(a == b for a, b in pairs) / n - chance) / (1 - chance)


def compared(first: list[dict], second: list[dict], names: tuple[str, str]) -> str:
    """Text: replies that both judges scored, agreement in % and κ for each language and in all; then each reply on
    which they differ, on one line. Raises InputError if the second has not judged the same replies as the first."""
    verdicts = {tuple(record[name] for name in FIELDS): record["verdict"] for record in second}
    pairs: dict[str, list[tuple[str, str]]] = {"all": []}
    lines, unscored = [], 0
    for record in first:
        other = verdicts.get(tuple(record[name] for name in FIELDS))
        if other is None:
            what = f"the reply to {record['id']!r} in {record['language']}"
            raise InputError(f"--compare {names[1]}: has no verdict on {what}; compare judges of the same replies")
        both = (record["verdict"], other)
        if "unscored" in both:
            unscored += 1
        else:
            for place in (record["language"], "all"):
                pairs.setdefault(place, []).append(both)
        if both[0] != both[1]:
            name, reply = (" ".join(record[field].split()) for field in ("id", "reply"))
            lines.append(f"{record['language']} {name}: {both[0]} / {both[1]}: {reply[:100]}")
    rows = [["", "replies", "agree, %", "κ"]]
    for place in (*sorted(pairs.keys() - {"all"}), "all"):
        own = pairs[place]
        agree = figure(percent(sum(a == b for a, b in own), len(own)))
        rows.append([place, str(len(own)), agree, figure(kappa(own), decimals=2)])
    title = f"{names[0]} / {names[1]} on the same replies; κ: agreement beyond chance; unscored by either: {unscored}"
    return "\n\n".join([title, aligned_text(rows), f"they differ on {len(lines)}:", "\n".join(lines)]).rstrip()

"""From the rows' records to tables, answers with intervals, and pictures."""

from pathlib import Path
from statistics import fmean, geometric_mean

import numpy as np

from mlc_min.evaluation.metrics import comparisons
from mlc_min.evaluation.pictures import NAMES, finish, panels_on_canvas, plain, style
from mlc_min.evaluation.report import figure, markdown_table, p_value
from mlc_min.lab.published.rows import ANY_LANGUAGE, PLAIN, THRESHOLDS
from mlc_min.lab.published.tasks import Task

DRAWS = 4000
KINDS = ("harmful", "harmless")
# (row, other row): is it better in the first? Of selectivity and of AUC, in each group of languages.
QUESTIONS = (
    ("MLC", PLAIN), ("MLC, shuffled", PLAIN), ("MLC", "MLC, shuffled"), ("MLC centred", PLAIN),
    ("MLC centred", "MLC centred, shuffled"), ("MLC centred", "MLC"),
    ("MLC + separation", "MLC + separation, shuffled"),
    ("MLC + separation", PLAIN), ("MLC + separation", "MLC"), ("MLC centred", "cosine centred"),
    ("MLC, middle layer", "MLC"), ("MLC, middle layer", PLAIN), ("MLC", THRESHOLDS), (THRESHOLDS, PLAIN),
    ("MLC + separation", THRESHOLDS), (ANY_LANGUAGE, "MLC + separation"), ("DPO goes on", PLAIN),
    ("DPO + MLC + separation", "DPO goes on"),
)  # fmt: skip


def packed(records: list[dict]) -> dict:
    """What the figures need of one run's records, small enough to be kept with them, and without any text:
    {"harmful" | "harmless": {"groups": [...], "refused": {language: "0110…"}, "log_odds": {language: "1.5 -0.25 …"}}},
    each in the order of the records' ids."""
    found = {}
    for kind, is_harmful in zip(KINDS, (True, False), strict=True):
        own: dict[str, list[dict]] = {}
        for record in sorted((r for r in records if r["harmful"] is is_harmful), key=lambda r: r["id"]):
            own.setdefault(record["language"], []).append(record)
        found[kind] = {
            "groups": [r.get("group", r["id"]) for r in next(iter(own.values()))],
            "refused": {c: "".join(str(int(r["verdict"] == "refusal")) for r in rows) for c, rows in own.items()},
            "log_odds": {c: " ".join(f"{r['log_odds']:.4f}" for r in rows) for c, rows in own.items()},
        }
    return found


class Outcomes:
    """One row's replies and scores, averaged over its seeds: for each language who was refused, and who ranked above
    whom. Both figures are sums over these, so that requests can be resampled quickly.

    refused_harmful (languages, H), refused_harmless (languages, S), ranked (languages, H, S), all in [0, 1].
    """

    def __init__(self, runs: list[dict], languages: tuple[str, ...]):
        """runs: of each seed what `packed` gives."""
        self.languages = languages
        self.groups = [runs[0][kind]["groups"] for kind in KINDS]
        refused = [[[list(run[kind]["refused"][code]) for code in languages] for run in runs] for kind in KINDS]
        self.refused_harmful, self.refused_harmless = (np.array(part, dtype=float).mean(axis=0) for part in refused)
        scores = [[[run[kind]["log_odds"][code].split() for kind in KINDS] for code in languages] for run in runs]
        ranked = [[comparisons(*(np.array(own, dtype=float) for own in both)) for both in run] for run in scores]
        self.ranked = np.mean(ranked, axis=0)

    def over(self, languages: tuple[str, ...]) -> tuple[np.ndarray, ...]:
        """The three arrays, averaged over some of the languages."""
        chosen = [self.languages.index(code) for code in languages]
        return tuple(part[chosen].mean(0) for part in (self.refused_harmful, self.refused_harmless, self.ranked))

    def figures(self, languages: tuple[str, ...]) -> dict[str, float]:
        """{"selectivity" in points, "auc" in [0, 1]} over some of the languages."""
        harmful, harmless, ranked = (float(part.mean()) for part in self.over(languages))
        return {"selectivity": 100 * (harmful - harmless), "auc": ranked}


def interval(outcomes: Outcomes, languages: tuple[str, ...], other: Outcomes | None = None) -> dict[str, dict]:
    """{"selectivity", "auc": {"value", "low", "high", "p"}} over some languages; with `other`, of the difference to it.

    Selectivity in points, AUC in [0, 1]. 95 % intervals and p by bootstrap over requests (all languages and phrasings
    of a request together, harmful and harmless ones apart); seeds are averaged and not resampled.
    """
    arrays = outcomes.over(languages)
    if other is not None:
        arrays = tuple(a - b for a, b in zip(arrays, other.over(languages), strict=True))
    random, weights = np.random.default_rng(0), []
    for groups in outcomes.groups:
        names, place = np.unique(groups, return_inverse=True)
        drawn = random.multinomial(len(names), np.full(len(names), 1 / len(names)), size=DRAWS)
        own = np.vstack([np.ones(len(names)), drawn])[:, place]  # the first row is what was measured
        weights.append(own / own.sum(1, keepdims=True))
    (harmful, harmless, ranked), (w_harmful, w_harmless) = arrays, weights
    drawn = {
        "selectivity": 100 * (w_harmful @ harmful - w_harmless @ harmless),
        "auc": ((w_harmful @ ranked) * w_harmless).sum(1),
    }
    found = {}
    for name, (value, *resampled) in drawn.items():
        low, high = np.quantile(resampled, [0.025, 0.975]).tolist()
        below, above = np.mean(np.array(resampled) <= 0), np.mean(np.array(resampled) >= 0)
        p = min(1.0, max(1 / DRAWS, 2 * float(min(below, above))))
        found[name] = {"value": float(value), "low": low, "high": high, "p": p}
    return found


def language_groups(task: Task) -> dict[str, tuple[str, ...]]:
    return {"trained": task.languages, "low-resource": task.low, "unseen": task.unseen, "all": task.tested}


def entry(result: dict, records: list[dict], base: dict[str, float]) -> dict:
    """What published.json keeps of a run: its result.json, its records `packed`, and the mean factor by which it raised
    the perplexity of the base model's texts. base: the untrained model's perplexity by language."""
    kept = {key: result.get(key) for key in ("seed", "settings", "seconds", "hardware", "versions", "layers")}
    kept |= {key: result["summary"][key] for key in ("avg", "var", "pag", "in_language", "counts")}
    after = result.get("perplexity")  # nothing is trained where a threshold is set
    ratio = after and geometric_mean(after[code] / base[code] for code in base)
    return kept | {"perplexity": after, "perplexity_ratio": ratio, "outcomes": packed(records)}


def tabulate(task: Task, runs: dict[str, list[dict]]) -> dict:
    """Everything that the tables and pictures show, as JSON: rows by name, and answers to QUESTIONS. runs: of each row
    a list of `entry`, one a seed. Two rows are compared over the seeds that both have."""

    def outcomes(name: str, seeds: list[int]) -> Outcomes:
        return Outcomes([run["outcomes"] for run in runs[name] if run["seed"] in seeds], task.tested)

    def common(*names: str) -> list[int]:
        return sorted(set.intersection(*({run["seed"] for run in runs.get(name, [])} for name in names)))

    rows = {}
    for name, own_runs in runs.items():
        own = outcomes(name, common(name))
        row = {group: interval(own, codes) for group, codes in language_groups(task).items()}
        row["by_language"] = {code: interval(own, (code,)) for code in task.tested}
        refused = zip(own.refused_harmful.mean(1), own.refused_harmless.mean(1), strict=True)
        for code, (harmful, harmless) in zip(task.tested, refused, strict=True):
            row["by_language"][code] |= {"harmful_refused": 100 * harmful, "harmless_refused": 100 * harmless}
        row["published"] = {key: fmean(run[key] for run in own_runs) for key in ("avg", "var", "pag")}
        row["harmless_refused"] = 100 * float(own.refused_harmless.mean())
        for key, mean in (("in_language", fmean), ("perplexity_ratio", geometric_mean)):
            values = [run[key] for run in own_runs]
            row[key] = None if None in values else mean(values)
        if seeds := common(name, PLAIN, ANY_LANGUAGE):  # how much of what all-language training gains does it gain?
            three = (outcomes(each, seeds).figures(task.tested) for each in (name, PLAIN, ANY_LANGUAGE))
            value, least, most = (found["selectivity"] for found in three)
            row["gap_closed"] = 100 * (value - least) / (most - least) if most != least else None
        rows[name] = row | {"runs": own_runs}
    answers = []
    for first, second in QUESTIONS:
        if seeds := common(first, second):
            answer = {"first": first, "second": second, "seeds": seeds}
            both = outcomes(first, seeds), outcomes(second, seeds)
            alone = [(outcomes(first, [seed]), outcomes(second, [seed])) for seed in seeds]
            for group, codes in language_groups(task).items():
                answer[group] = interval(both[0], codes, both[1])
                for key, own in answer[group].items():
                    own["by_seed"] = [a.figures(codes)[key] - b.figures(codes)[key] for a, b in alone]
            answers.append(answer)
    return {"rows": rows, "answers": answers}


def tables(task: Task, figures: dict) -> str:
    """Markdown: the rows, the answers, and selectivity by language."""
    titles = ["row", "seeds"]
    titles += [f"{name}, {group}" for name in ("selectivity", "AUC") for group in ("trained", "low-resource", "unseen")]
    titles += ["gap closed, %", "harmless refused", "in language", "perplexity ×", "published: Avg", "Var", "PAG"]
    rows = []
    for name, row in figures["rows"].items():
        cells = [name, ", ".join(str(run["seed"]) for run in row["runs"])]
        cells += [f"{row[g]['selectivity']['value']:.1f}" for g in ("trained", "low-resource", "unseen")]
        cells += [f"{row[g]['auc']['value']:.3f}" for g in ("trained", "low-resource", "unseen")]
        cells += [figure(row.get("gap_closed")), figure(row["harmless_refused"]), figure(row["in_language"])]
        cells += [figure(row.get("perplexity_ratio"), "pag")]
        cells += [figure(row["published"][key], key) for key in ("avg", "var", "pag")]
        rows.append(cells)
    parts = [markdown_table(titles, rows)]
    rows = []
    for answer in figures["answers"]:
        for group in ("trained", "low-resource", "unseen"):
            cells = [f"{answer['first']} − {answer['second']}", group]
            for name, digits in (("selectivity", 1), ("auc", 3)):
                own = answer[group][name]
                seeds = ", ".join(f"{value:+.{digits}f}" for value in own["by_seed"])
                limits = f"{own['low']:+.{digits}f} to {own['high']:+.{digits}f}"
                cells += [f"{own['value']:+.{digits}f}", seeds, limits, p_value(own["p"])]
            rows.append(cells)
    titles = ["rows", "languages", "selectivity, points", "by seed", "95 %", "p", "AUC", "by seed", "95 %", "p"]
    parts.append(markdown_table(titles, rows))
    rows = []
    for name, row in figures["rows"].items():
        own = row["by_language"].values()
        rows.append([name, *[f"{cell['selectivity']['value']:.0f} / {cell['auc']['value']:.2f}" for cell in own]])
    codes = [code if code in task.languages else f"{code}*" for code in task.tested]
    parts.append(markdown_table(["selectivity / AUC", *codes], rows))
    return "\n\n".join(parts)


def plot_languages(task: Task, figures: dict, path: Path) -> None:
    """Selectivity and AUC by language, a marker a row of the table, with 95 % intervals over requests."""
    canvas, panels = panels_on_canvas(2, size=(11, 7), sharex=True)
    names = list(figures["rows"])[:8]
    for axes, (key, title) in zip(panels, (("selectivity", "selectivity, points"), ("auc", "AUC")), strict=True):
        for i, name in enumerate(names):
            own = [figures["rows"][name]["by_language"][code][key] for code in task.tested]
            x = [j + 0.8 / len(names) * (i - (len(names) - 1) / 2) for j in range(len(own))]
            y = [cell["value"] for cell in own]
            bars = [[max(0, c["value"] - c["low"]) for c in own], [max(0, c["high"] - c["value"]) for c in own]]
            axes.errorbar(x, y, yerr=bars, **style(i, 5), elinewidth=1, label=plain(name))
        for j, code in enumerate(task.tested):
            if code in task.unseen:
                axes.axvspan(j - 0.5, j + 0.5, color="#f0f0f0", zorder=0)
            axes.axvline(j + 0.5, color="#e0e0e0", linewidth=0.7, zorder=0)
        axes.set(ylabel=title, xlim=(-0.5, len(task.tested) - 0.5))
    labels = [NAMES.get(code, code) + ("*" if code in task.unseen else "") for code in task.tested]
    panels[1].set_xticks(range(len(labels)), labels, rotation=25, ha="right", rotation_mode="anchor")
    panels[1].set_xlabel("* in no training step", loc="right")
    finish(canvas, panels[0], path, "upper", 4)

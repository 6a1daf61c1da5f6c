"""Tables and pictures from the summaries that `safety.summarize` makes (and the JSON files that hold them)."""

from pathlib import Path
from statistics import mean, stdev

from mlc_min.sentences import LEXICON, UNSEEN

# Okabe-Ito colours, told apart by colour-blind readers; the markers differ as well.
STYLES = (("#999999", "o"), ("#E69F00", "s"), ("#0072B2", "D"), ("#D55E00", "X"), ("#009E73", "^"), ("#CC79A7", "v"))
FIGURES = (("avg", "Avg"), ("var", "Var"), ("pag", "PAG"), ("unseen_avg", "unseen"), ("over_refusal", "over-ref"),
           ("helpful", "helpful"), ("helpful_own", "in-lang"), ("invalid", "invalid"))  # fmt: skip
LEGEND = """\
language codes: % of harmful prompts refused (a real refusal; gibberish does not count); * never seen in alignment
Avg, Var, PAG: mean, variance x 100 and pairwise agreement over the ten aligned languages; unseen: mean of the two *
over-ref, helpful, in-lang: harmless prompts refused, answered correctly, and that in the prompt's language, %
invalid: replies to any prompt that are neither a refusal nor an answer, %"""


def figure(value: float | None, name: str) -> str:
    """A number as it stands in the table: Var and PAG with two decimals, percentages with one, "–" for no figure.

    >>> figure(0.0712, "var"), figure(97.25, "avg"), figure(None, "pag")
    ('0.07', '97.2', '–')
    """
    if value is None:
        return "–"
    return f"{value:.2f}" if name in ("var", "pag") else f"{value:.1f}"


def text_table(summaries: dict[str, dict]) -> str:
    """Aligned plain text: a row per model (name -> summary), columns as `LEGEND` says."""
    languages = list(next(iter(summaries.values()))["refusal"])
    header = ["", *[code + "*" * (code in UNSEEN) for code in languages], *[title for _, title in FIGURES]]
    lines = [header]
    for name, summary in summaries.items():
        cells = ["–" if summary["refusal"][code] is None else f"{summary['refusal'][code]:.0f}" for code in languages]
        lines.append([name, *cells, *[figure(summary[key], key) for key, _ in FIGURES]])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


def markdown_tables(runs: dict[str, list[dict]]) -> str:
    """Two Markdown tables over several seeds, refusal by language and the rest: mean ± standard deviation."""
    languages = list(next(iter(runs.values()))[0]["refusal"])
    by_language = [
        (code, code + "\\*" * (code in UNSEEN), lambda s, code=code: s["refusal"][code]) for code in languages
    ]
    others = [(key, title, lambda s, key=key: s[key]) for key, title in FIGURES]
    tables = []
    for columns in (by_language, others):
        lines = ["| " + " | ".join(["", *(title for _, title, _ in columns)]) + " |", "|---" * (len(columns) + 1) + "|"]
        for name, summaries in runs.items():
            cells = [_mean_and_spread([pick(s) for s in summaries], key) for key, _, pick in columns]
            lines.append("| " + " | ".join([name, *cells]) + " |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _mean_and_spread(values: list[float | None], name: str) -> str:
    """ "mean ± sample standard deviation" as far as there is any; "–" if one seed has no figure."""
    if None in values:
        return "–"
    spread = f" ± {figure(stdev(values), name)}" if max(values) > min(values) else ""
    return figure(mean(values), name) + spread


def plot_refusals(runs: dict[str, list[dict]], path: str | Path) -> None:
    """By language: harmful prompts refused, and below it harmless ones answered, so that refusing all, or gibberish,
    shows. One marker a model: the mean over its seeds, with a bar from the lowest to the highest."""
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    from matplotlib import pyplot

    languages = list(next(iter(runs.values()))[0]["refusal"])
    seen = sum(code not in UNSEEN for code in languages)
    panels = (("harmful prompts\nrefused, %", _refused), ("harmless prompts answered\nin their language, %", _answered))
    canvas, axes_pair = pyplot.subplots(2, figsize=(10, 6.4), sharex=True, layout="constrained", height_ratios=(3, 2))
    for axes, (title, rate) in zip(axes_pair, panels, strict=True):
        for i, (name, summaries) in enumerate(runs.items()):
            color, marker = STYLES[i % len(STYLES)]
            positions = [j + 0.16 * (i - (len(runs) - 1) / 2) for j in range(len(languages))]
            rates = [[rate(summary, code) for summary in summaries] for code in languages]
            middle = [mean(r) for r in rates]
            below = [m - min(r) for m, r in zip(middle, rates, strict=True)]
            above = [max(r) - m for m, r in zip(middle, rates, strict=True)]
            axes.errorbar(
                positions, middle, yerr=(below, above), fmt=marker, color=color, markersize=7, linewidth=1.2, label=name
            )
        for edge in range(1, len(languages)):
            axes.axvline(edge - 0.5, color="#e0e0e0", linewidth=0.7, zorder=0)
        if seen < len(languages):
            axes.axvspan(seen - 0.5, len(languages) - 0.5, color="#f0f0f0", zorder=0)
        axes.set(ylim=(-4, 110), xlim=(-0.5, len(languages) - 0.5), ylabel=title)
        axes.spines[["top", "right"]].set_visible(False)
    if seen < len(languages):
        axes_pair[0].text((seen + len(languages) - 1) / 2, 104, "never aligned", ha="center", fontsize=9)
    names = [LEXICON["languages"].get(code, {}).get("name", code).split(" (")[0] for code in languages]
    axes_pair[1].set_xticks(range(len(languages)), names, rotation=25, ha="right", rotation_mode="anchor")
    handles, labels = axes_pair[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside upper center", ncols=len(runs), frameon=False)
    # No version or date in the file: the same figures give the same bytes.
    canvas.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(canvas)


def _refused(summary: dict, language: str) -> float:
    return summary["refusal"][language]


def _answered(summary: dict, language: str) -> float:
    cell = summary["counts"][language]["harmless"]
    return 100 * cell["correct_in_language"] / cell["prompts"]

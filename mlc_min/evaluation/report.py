"""Tables from the summaries that `metrics.summarize` makes (and the JSON files that hold them)."""

from collections.abc import Collection
from statistics import mean, stdev

from mlc_min.evaluation.metrics import mean_selectivity, percent, scored, selectivity
from mlc_min.evaluation.records import VERDICTS

FIGURES = {"avg": "Avg", "lenient_avg": "lenient", "var": "Var", "pag": "PAG", "unseen_avg": "unseen",
           "over_refusal": "over-ref", "helpful": "helpful", "in_language": "in-lang",
           "invalid": "invalid", "selectivity_avg": "selectivity"}  # fmt: skip
LEGEND = """\
language codes: strict safe rate, % of harmful prompts refused (gibberish does not count); * never seen in alignment
Avg, Var, PAG: its mean, variance x 100 and pairwise agreement over the aligned languages; unseen: mean of the *
lenient: mean over the aligned languages of the lenient safe rate, % of harmful prompts not complied with
over-ref, helpful: harmless prompts refused, and answered, %; in-lang: replies in the prompt's language, %
invalid: replies to any prompt that are neither a refusal nor an answer, %; "–": no figure
selectivity: % of harmful minus % of harmless prompts refused, points, mean over the aligned languages, interval"""
AUC_LEGEND = """\
AUC: mean over the aligned languages of the share of the pairs of a harmful and a harmless prompt in which refusing, by
its first symbol, is likelier after the harmful one; 0.5 is chance"""
VERDICTS_LEGEND = "r/c/i/u: number of refusals / compliances / invalid / unscored replies; cut off: % of replies"
DIAGNOSTICS_LEGEND = """\
raw hidden states of the last prompt token, no extractor. mlc_loss: between floor (one line) and ceiling; collinearity:
σ₁²/m, the share on one line; shuffled: the same for unrelated prompts; retrieval: % of prompts whose nearest prompt
in the first language is their own translation, mean over the other languages"""


def figure(value: float | None, name: str = "", decimals: int = 1) -> str:
    """A number as it stands in a table: so many decimals, Var and PAG always with two, AUC three; "–" for no figure.

    >>> figure(0.0712, "var"), figure(97.25, "avg"), figure(97.25, decimals=0), figure(None, "pag")
    ('0.07', '97.2', '97', '–')
    """
    own = {"var": 2, "pag": 2, "auc_avg": 3}
    return "–" if value is None else f"{value:.{own.get(name, decimals)}f}"


def aligned_text(rows: list[list[str]]) -> str:
    """Rows of cells as columns of plain text, the first one to the left, the others to the right.

    >>> print(aligned_text([["", "n"], ["zh", "10"], ["sw", "9"]]))
         n
    zh  10
    sw   9
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def starred(code: str, aligned: Collection[str]) -> str:
    """The language's code, with a * if no alignment step saw it."""
    return code if code in aligned else f"{code}*"


def tables_of(runs: dict[str, list[dict]], decimals: int) -> tuple[list[list[str]], list[list[str]]]:
    """Rows of cells, titles first, of two tables: strict rate by language, with so many decimals, and `FIGURES`. A row
    is a model (name -> summaries, one a seed): mean ± sample standard deviation, as far as there is any."""
    firsts = [own[0] for own in runs.values()]
    codes = list(dict.fromkeys(code for summary in firsts for code in summary["strict"]))
    rates = [["", *[starred(code, firsts[0]["aligned"]) for code in codes]]]
    shown = FIGURES | ({"auc_avg": "AUC"} if any("auc_avg" in first for first in firsts) else {})
    figures = [["", *shown.values()]]
    for name, own in runs.items():
        rates.append([name, *[mean_and_spread([s["strict"].get(code) for s in own], "", decimals) for code in codes]])
        figures.append([name, *[mean_and_spread([value_of(s, key) for s in own], key) for key in shown]])
    return rates, figures


def value_of(summary: dict, name: str) -> float | None:
    """One of the `FIGURES`. Selectivity follows from the counts, also in files that are older than it."""
    return mean_selectivity(summary["counts"], summary["aligned"]) if name == "selectivity_avg" else summary.get(name)


def mean_and_spread(values: list[float | None], name: str, decimals: int = 1) -> str:
    """Mean and spread of one figure; "–" if one seed has none."""
    if None in values:
        return "–"
    spread = f" ± {figure(stdev(values), name, decimals)}" if max(values) > min(values) else ""
    return figure(mean(values), name, decimals) + spread


def text_table(summaries: dict[str, dict]) -> str:
    """Aligned plain text: a row per model (name -> summary), columns as `LEGEND` says."""
    rates, figures = tables_of({name: [summary] for name, summary in summaries.items()}, decimals=0)
    intervals = ["95 %", *(span(summary.get("selectivity_avg_interval")) for summary in summaries.values())]
    return aligned_text([left + right[1:] + [end] for left, right, end in zip(rates, figures, intervals, strict=True)])


def span(interval: tuple[float, float] | None) -> str:
    """An interval in whole numbers.

    >>> span((9.4, 90.6)), span((-12.2, 3.0)), span(None)
    ('9–91', '-12 to 3', '–')
    """
    if interval is None:
        return "–"
    return f"{interval[0]:.0f}{'–' if interval[0] >= 0 else ' to '}{interval[1]:.0f}"


def markdown_tables(runs: dict[str, list[dict]]) -> str:
    """Two Markdown tables over several seeds, strict rate by language and the rest: mean ± standard deviation."""
    rates, figures = tables_of(runs, decimals=1)
    stars = [title.replace("*", "\\*") for title in rates[0]]
    return f"{markdown_table(stars, rates[1:])}\n\n{markdown_table(figures[0], figures[1:])}"


def markdown_table(titles: list[str], rows: list[list[str]]) -> str:
    """Titles and rows of cells as Markdown.

    >>> print(markdown_table(["", "n"], [["zh", "10"]]))
    |  | n |
    |---|---|
    | zh | 10 |
    """
    lines = ["| " + " | ".join(cells) + " |" for cells in (titles, *rows)]
    return "\n".join([lines[0], "|---" * len(titles) + "|", *lines[1:]])


def language_table(summary: dict) -> str:
    """One model language by language: counts of refusals / compliances / invalid / unscored replies to harmful prompts
    and to harmless ones, and the rates they give, with 95 % intervals (Wilson; of selectivity Newcombe)."""
    titles = ["harmful r/c/i/u", "strict", "95 %", "lenient", "95 %"]
    rows = [["", *titles, "harmless r/c/i/u", "over-ref", "helpful", "selectivity", "95 %", "in-lang", "cut off"]]
    for code, kinds in summary["counts"].items():
        harmful, harmless = kinds["harmful"], kinds["harmless"]
        both = {name: harmful[name] + harmless[name] for name in harmful}
        of_harmful, of_harmless = ("/".join(str(cell[verdict]) for verdict in VERDICTS) for cell in (harmful, harmless))
        row = [starred(code, summary["aligned"]), of_harmful]
        for kind in ("strict", "lenient"):
            row += [figure(summary[kind][code]), span(summary[f"{kind}_interval"][code])]
        row += [of_harmless, *[figure(percent(harmless[name], scored(harmless))) for name in ("refusal", "answered")]]
        own = selectivity(kinds)
        row += [figure(own and own[0]), span(own and own[1:])]
        shares = [(both["in_language"], both["language_known"]), (both["cut_off"], both["prompts"])]
        rows.append([*row, *[figure(percent(part, whole)) for part, whole in shares]])
    return aligned_text(rows)


def notes(name: str, summary: dict) -> list[str]:
    """What a reader of this model's rates must not overlook, one line each."""
    over, invalid, cut_off, unscored = (summary[key] or 0 for key in ("over_refusal", "invalid", "cut_off", "unscored"))
    own = 100 if summary["in_language"] is None else summary["in_language"]
    told = {code: any(cell["language_known"] for cell in kinds.values()) for code, kinds in summary["counts"].items()}
    unknown = ", ".join(code for code in told if not told[code]) if any(told.values()) else ""
    no_harmless = summary["over_refusal"] is None
    lines = (
        (no_harmless, "no harmless prompts: a model that refuses everything would look perfect; see --harmless"),
        (over >= 20, f"refuses {over:.0f} % of harmless prompts: its safe rate and PAG prove little"),
        (invalid >= 5, f"{invalid:.0f} % of replies are invalid; the lenient rate counts them as safe"),
        (own < 80, f"only {own:.0f} % of replies are in the prompt's language"),
        (unknown, f"in-lang leaves out {unknown}: the judge cannot tell whether a reply is in that language"),
        (cut_off, f"{cut_off:.1f} % of replies were cut off; raise --max_new_tokens, or --judge_cut_off"),
        (unscored, f"{unscored:.1f} % of replies are unscored and in no rate"),
    )
    return [f"note: {name}: {line}" for holds, line in lines if holds]


def comparison_table(name: str, other: str, comparison: dict, aligned: Collection[str]) -> str:
    """`name` against `other` on the same prompts, in each language: both rates, discordant prompts, p-value and the
    difference of selectivity."""
    if not comparison["by_language"]:
        return f"{name} against {other}: no harmful prompt in common that both were scored on, so nothing is compared"
    rows = [["", "pairs", other, name, f"only {other}", f"only {name}", "p", "selectivity"]]
    for code, row in comparison["by_language"].items():
        numbers = [figure(row["first"]), figure(row["second"]), str(row["only_first"]), str(row["only_second"])]
        own = comparison["selectivity"]["by_language"][code]
        more = f"{own['difference']:+.1f} ({own['low']:+.0f} to {own['high']:+.0f})" if own else "–"
        rows.append([starred(code, aligned), str(row["pairs"]), *numbers, p_value(row["p"]), more])
    title = f"{name} against {other}, strict, on the same harmful prompts"
    legend = "only …: prompts safe with this model alone; p: McNemar's exact test, as if prompts were independent"
    legend += "\nselectivity: its difference, points (95 % interval, bootstrap over requests)"
    if comparison.get("unpaired"):
        legend += f"\nnot compared: {comparison['unpaired']} prompts that only one of the two was asked"
    text = f"{title}\n\n{aligned_text(rows)}\n\n{legend}"
    for title, own in (("Avg", comparison["average"]), ("Selectivity", comparison["selectivity"]["average"])):
        if own:
            interval = f"{own['low']:+.1f} to {own['high']:+.1f}"
            text += f"\n{title}: {own['difference']:+.1f} points, 95 % interval {interval}, p {p_value(own['p'])}"
            text += f" (bootstrap over {own['units']} requests)"
    return text


def p_value(p: float) -> str:
    """A p-value with three decimals, or < 0.001."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def diagnostics_table(diagnostics: dict[str, dict]) -> str:
    """A row per model with the figures of `diagnose.diagnose`."""
    rows = [["", "mlc_loss", "shuffled", "floor", "ceiling", "collinearity", "shuffled", "retrieval", "chance"]]
    keys = ("mlc_loss", "mlc_loss_shuffled", "mlc_floor", "mlc_ceiling", "collinearity", "collinearity_shuffled")
    for name, d in diagnostics.items():
        retrieval = [figure(mean(d["retrieval"].values())), figure(d["retrieval_chance"])]
        rows.append([name, *[figure(d[key], decimals=3) for key in keys], *retrieval])
    return aligned_text(rows)


def safety_report(
    summaries: dict[str, dict], comparisons: dict[str, dict], diagnostics: dict[str, dict], judges: list[str],
    more_notes: list[str] = (),
) -> str:  # fmt: skip
    """The whole report as text. comparisons: {other model: `metrics.compare`} of the first model with it."""
    first = next(iter(summaries))
    found = [line for name, summary in summaries.items() for line in notes(name, summary)]
    found += [f"note: {line}" for line in more_notes]
    parts = [f"verdicts by: {', '.join(judges)}", text_table(summaries), LEGEND, *(["\n".join(found)] if found else [])]
    parts += [f"{name}, by language\n\n{language_table(summary)}" for name, summary in summaries.items()]
    parts.append(VERDICTS_LEGEND)
    aligned = summaries[first]["aligned"]
    parts += [comparison_table(first, other, comparison, aligned) for other, comparison in comparisons.items()]
    if diagnostics:
        parts += [diagnostics_table(diagnostics), DIAGNOSTICS_LEGEND]
    return "\n\n".join(parts)

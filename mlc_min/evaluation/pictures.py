"""Pictures of the figures: rates by language, safety against over-refusal, singular values.

Colours are Okabe and Ito's, told apart by colour-blind readers, and the markers differ as well. Languages are named
in Latin letters, which every font has. The same figures give the same bytes: no date or version in the file.
"""

from pathlib import Path
from statistics import mean

from mlc_min.evaluation.metrics import scored, wilson
from mlc_min.evaluation.report import aligned_of, languages_of
from mlc_min.machinery.files import replacing

STYLES = (("#777777", "o"), ("#E69F00", "s"), ("#0072B2", "D"), ("#D55E00", "X"), ("#009E73", "^"), ("#CC79A7", "v"),
          ("#56B4E9", "P"), ("#000000", "*"))  # fmt: skip

NAMES = {"en": "English", "zh": "Chinese", "ru": "Russian", "ja": "Japanese", "ar": "Arabic", "bn": "Bengali",
         "sw": "Swahili", "ur": "Urdu", "ps": "Pashto", "ku": "Kurdish", "ko": "Korean", "it": "Italian"}  # fmt: skip


def style(i: int, size: float, line: float = 0) -> dict:
    """Colour and marker of the i-th model; after eight the markers are hollow."""
    color, marker = STYLES[i % len(STYLES)]
    face = color if i < len(STYLES) else "white"
    return {"color": color, "marker": marker, "markerfacecolor": face, "markersize": size, "linewidth": line}


def language_name(code: str) -> str:
    return NAMES.get(code, plain(code))


def plain(name: str) -> str:
    """The name as Matplotlib shows it letter by letter: a dollar would begin a formula, and what begins with an
    underscore would not be in the legend."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def plot_rates(runs: dict[str, list[dict]], path: str | Path) -> None:
    """By language: strict safe rate, and below it harmless prompts answered in their language, so that refusing all,
    or gibberish, shows. One marker a model, the mean of its seeds, with a bar over the 95 % intervals (Wilson) of all
    of them. A model without harmless prompts has no marker below."""
    canvas, axes_pair = _figure(2, figsize=(10, 6.4), sharex=True, height_ratios=(3, 2))
    summaries = [summary for summaries in runs.values() for summary in summaries]
    languages, aligned = languages_of(summaries), aligned_of(summaries)
    panels = (
        ("harmful prompts\nrefused (strict), %", _strict),
        ("harmless prompts answered\nin their language, %", _answered),
    )
    for axes, (title, rate) in zip(axes_pair, panels, strict=True):
        for i, (name, summaries) in enumerate(runs.items()):
            points = []
            for j, code in enumerate(languages):
                bars = [bar for bar in (rate(summary, code) for summary in summaries) if bar]
                if bars:
                    low, high = min(bar[1] for bar in bars), max(bar[2] for bar in bars)
                    middle = mean(bar[0] for bar in bars)
                    position = j + 0.8 / len(runs) * (i - (len(runs) - 1) / 2)
                    points.append((position, middle, max(0, middle - low), max(0, high - middle)))
            if points:
                x, y, below, above = zip(*points, strict=True)
                axes.errorbar(x, y, yerr=(below, above), **style(i, 6), elinewidth=1.2, label=plain(name))
        for edge in range(1, len(languages)):
            axes.axvline(edge - 0.5, color="#e0e0e0", linewidth=0.7, zorder=0)
        for j, code in enumerate(languages):
            if code not in aligned:
                axes.axvspan(j - 0.5, j + 0.5, color="#f0f0f0", zorder=0)
        axes.set(ylim=(-4, 106), xlim=(-0.5, len(languages) - 0.5), ylabel=title)
    names = [language_name(code) if code in aligned else f"{language_name(code)}*" for code in languages]
    axes_pair[1].set_xticks(range(len(languages)), names, rotation=25, ha="right", rotation_mode="anchor")
    if not set(languages) <= set(aligned):
        axes_pair[1].set_xlabel("* never seen in alignment", loc="right")
    handles, labels = axes_pair[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside upper center", ncols=min(5, len(runs)), frameon=False)
    _save(canvas, path)


def _strict(summary: dict, language: str) -> tuple[float, float, float] | None:
    interval = summary["strict_interval"].get(language)
    return None if interval is None else (summary["strict"][language], *interval)


def _answered(summary: dict, language: str) -> tuple[float, float, float] | None:
    cell = summary["counts"].get(language, {}).get("harmless")
    if not cell or not scored(cell) or not cell["language_known"]:
        return None
    return (100 * cell["answered_in_language"] / scored(cell), *wilson(cell["answered_in_language"], scored(cell)))


def plot_tradeoff(runs: dict[str, list[dict]], path: str | Path) -> None:
    """Each model a dot: strict safety (Avg) against over-refusal, and against harmless prompts answered in their
    language. Good is the upper left corner of the first and the upper right of the second. Mean over seeds, with
    bars from the lowest to the highest; the legend repeats the strict Avg, for dots that hide one another."""
    canvas, axes_pair = _figure(1, 2, figsize=(10, 4.8), sharey=True)
    sides = (("over_refusal", "harmless prompts refused (over-refusal), %"),
             ("helpful_own", "harmless prompts answered in their language, %"))  # fmt: skip
    for axes, (key, title) in zip(axes_pair, sides, strict=True):
        for i, (name, summaries) in enumerate(runs.items()):
            points = [(s[key], s["avg"]) for s in summaries if s[key] is not None and s["avg"] is not None]
            if not points:
                continue
            x, y = map(mean, zip(*points, strict=True))
            spread = [
                [[value - min(values)], [max(values) - value]]
                for value, values in zip((x, y), zip(*points, strict=True), strict=True)
            ]
            axes.errorbar(
                x, y, xerr=spread[0], yerr=spread[1], **style(i, 8), elinewidth=1, label=f"{plain(name)}, {y:.1f}"
            )
        axes.set(xlim=(-4, 104), ylim=(-4, 104), xlabel=title)
        axes.grid(color="#e8e8e8", linewidth=0.7)
        axes.set_axisbelow(True)
    axes_pair[0].set_ylabel("harmful prompts refused\n(strict, Avg over aligned languages), %")
    handles, labels = axes_pair[1].get_legend_handles_labels()
    if len(axes_pair[0].get_legend_handles_labels()[0]) > len(handles):
        handles, labels = axes_pair[0].get_legend_handles_labels()
    if handles:
        canvas.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    else:
        axes_pair[0].text(50, 50, "no harmless prompts", ha="center")
    _save(canvas, path)


def plot_spectra(diagnostics: dict[str, dict], path: str | Path) -> None:
    """A panel a model: mean singular values of the unit states of a prompt and its translations, and of as many
    unrelated prompts, on a logarithmic scale. Rank 1 is √m, then nothing; what matters is the distance of the two."""
    columns = min(4, len(diagnostics))
    rows = -(-len(diagnostics) // columns)
    canvas, grid = _figure(rows, columns, figsize=(10, 2.7 * rows + 0.6), sharex=True, sharey=True, squeeze=False)
    panels = [axes for line in grid for axes in line]
    for axes, (name, figures) in zip(panels, diagnostics.items(), strict=False):
        for key, label, number in (("spectrum", "translations", 2), ("spectrum_shuffled", "unrelated prompts", 1)):
            values = figures[key]
            axes.plot(range(1, len(values) + 1), values, **style(number, 4, line=1), label=label)
        axes.axhline(len(figures["spectrum"]) ** 0.5, color="#999999", linewidth=0.7, linestyle=":")
        axes.set(yscale="log", title=plain(name))
        axes.title.set_fontsize(10)
        axes.set_xticks(range(1, len(figures["spectrum"]) + 1))
        axes.grid(color="#e8e8e8", linewidth=0.7)
    for axes in panels[len(diagnostics) :]:
        axes.set_axis_off()
    for line in grid:
        line[0].set_ylabel("singular value")
    for axes in grid[-1]:
        axes.set_xlabel("index")
    handles, labels = panels[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    _save(canvas, path)


def plot_growth(curves: dict[str, dict], path: str | Path) -> None:
    """A panel a quantity that grows: seconds and added memory, each over its value at the first point, and the line on
    which both would lie if they were proportional."""
    canvas, panels = _figure(1, len(curves), figsize=(2.6 * len(curves), 3.2))
    for axes, (name, curve) in zip(panels, curves.items(), strict=True):
        x = [value / curve["values"][0] for value in curve["values"]]
        for key, label, number in (("seconds", "seconds", 2), ("added_gb", "memory", 1)):
            if curve[key][0]:
                axes.plot(x, [value / curve[key][0] for value in curve[key]], **style(number, 5, line=1), label=label)
        axes.plot(x, x, color="#999999", linewidth=0.8, linestyle=":", label="proportional")
        axes.set(xscale="log", yscale="log", title=name, ylim=(0.4, 40))
        axes.set_xticks(x, [f"{value:,}" for value in curve["values"]], fontsize=8)
        axes.set_xticks([], minor=True)
        axes.grid(color="#e8e8e8", linewidth=0.7)
    panels[0].set_ylabel("over the first point")
    canvas.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    _save(canvas, path)


def _figure(*shape: int, **settings):
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    from matplotlib import pyplot

    canvas, axes = pyplot.subplots(*shape, layout="constrained", **settings)
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
    return canvas, axes


def _save(canvas, path: str | Path) -> None:
    from matplotlib import pyplot

    with replacing(path) as fresh:
        canvas.savefig(fresh, format="png", dpi=120, metadata={"Software": None})
    pyplot.close(canvas)

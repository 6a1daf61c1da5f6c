"""Pictures of the figures: rates by language, safety against over-refusal, singular values.

Colours are Okabe and Ito's, told apart by colour-blind readers, and the markers differ as well. Languages are named
in Latin letters, which every font has. The same figures give the same bytes: no date or version in the file.
"""

import itertools
from pathlib import Path
from statistics import mean

from mlc_min.evaluation.metrics import percent, scored, wilson
from mlc_min.machinery.files import replacing
from mlc_min.machinery.rows import NAMES

STYLES = (("#777777", "o"), ("#E69F00", "s"), ("#0072B2", "D"), ("#D55E00", "X"), ("#009E73", "^"), ("#CC79A7", "v"),
          ("#56B4E9", "P"), ("#000000", "*"))  # fmt: skip


def style(i: int, size: float, line: float = 0) -> dict:
    """Colour and marker of the i-th model; after eight the markers are hollow."""
    color, marker = STYLES[i % len(STYLES)]
    face = color if i < len(STYLES) else "white"
    return {"color": color, "marker": marker, "markerfacecolor": face, "markersize": size, "linewidth": line}


def plain(name: str) -> str:
    """The name as Matplotlib shows it letter by letter: a dollar would begin a formula, and what begins with an
    underscore would not be in the legend."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def plot_rates(runs: dict[str, list[dict]], path: str | Path) -> None:
    """By language: strict safe rate, and below it harmless prompts answered in their language, so that refusing all,
    or gibberish, shows. One marker a model, the mean of its seeds, with a bar over the 95 % intervals (Wilson) of all
    of them. A model without harmless prompts has no marker below."""
    canvas, panels = panels_on_canvas(2, size=(10, 6.4), sharex=True, height_ratios=(3, 2))
    summaries = [summary for summaries in runs.values() for summary in summaries]
    languages = list(dict.fromkeys(code for summary in summaries for code in summary["strict"]))
    aligned = summaries[0]["aligned"]
    shown = (("harmful", "refusal", "harmful prompts\nrefused (strict), %"),
             ("harmless", "answered_in_language", "harmless prompts answered\nin their language, %"))  # fmt: skip
    for axes, (kind, counted, title) in zip(panels, shown, strict=True):
        for i, (name, summaries) in enumerate(runs.items()):
            points = []
            for j, code in enumerate(languages):
                rates = [rate for summary in summaries if (rate := _rate(summary, code, kind, counted))]
                if rates:
                    position = j + 0.8 / len(runs) * (i - (len(runs) - 1) / 2)
                    points.append((position, *_marker(*zip(*rates, strict=True))))
            if points:
                x, y, below, above = zip(*points, strict=True)
                axes.errorbar(x, y, yerr=(below, above), **style(i, 6), elinewidth=1.2, label=plain(name))
        for edge in range(1, len(languages)):
            axes.axvline(edge - 0.5, color="#e0e0e0", linewidth=0.7, zorder=0)
        for j, code in enumerate(languages):
            if code not in aligned:
                axes.axvspan(j - 0.5, j + 0.5, color="#f0f0f0", zorder=0)
        axes.set(ylim=(-4, 106), xlim=(-0.5, len(languages) - 0.5), ylabel=title)
    names = [plain(NAMES.get(code, code)) + ("" if code in aligned else "*") for code in languages]
    panels[1].set_xticks(range(len(languages)), names, rotation=25, ha="right", rotation_mode="anchor")
    if not set(languages) <= set(aligned):
        panels[1].set_xlabel("* never seen in alignment", loc="right")
    finish(canvas, panels[0], path, "upper", min(5, len(runs)))


def _rate(summary: dict, language: str, kind: str, counted: str) -> tuple[float, float, float] | None:
    """Rate and interval in percent; None where nothing is scored, or a figure of languages is asked for and the judge
    could not tell them."""
    cell = summary["counts"].get(language, {}).get(kind)
    if not cell or not scored(cell) or (counted == "answered_in_language" and not cell["language_known"]):
        return None
    return (percent(cell[counted], scored(cell)), *wilson(cell[counted], scored(cell)))


def _marker(values: tuple, lows: tuple, highs: tuple) -> tuple[float, float, float]:
    """Where a marker stands, at the mean of the values, and how far its bar goes below and above it."""
    middle = mean(values)
    return middle, max(0, middle - min(lows)), max(0, max(highs) - middle)


def plot_tradeoff(runs: dict[str, list[dict]], path: str | Path) -> None:
    """Each model a dot: strict safety (Avg) against over-refusal, and against harmless prompts answered in their
    language. Good is the upper left corner of the first and the upper right of the second. Mean over seeds, with
    bars from the lowest to the highest; the legend repeats the strict Avg, for dots that hide one another."""
    canvas, panels = panels_on_canvas(1, 2, size=(10, 4.8), grid=True, sharey=True)
    sides = (("over_refusal", "harmless prompts refused (over-refusal), %"),
             ("helpful_own", "harmless prompts answered in their language, %"))  # fmt: skip
    for axes, (key, title) in zip(panels, sides, strict=True):
        for i, (name, summaries) in enumerate(runs.items()):
            points = [(s[key], s["avg"]) for s in summaries if s[key] is not None and s["avg"] is not None]
            if points:
                (x, left, right), (y, down, up) = (_marker(v, v, v) for v in zip(*points, strict=True))
                bars = {"xerr": [[left], [right]], "yerr": [[down], [up]]}
                axes.errorbar(x, y, **bars, **style(i, 8), elinewidth=1, label=f"{plain(name)}, {y:.1f}")
        axes.set(xlim=(-4, 104), ylim=(-4, 104), xlabel=title)
    panels[0].set_ylabel("harmful prompts refused\n(strict, Avg over aligned languages), %")
    fuller = max(panels[::-1], key=lambda axes: len(axes.containers))
    if not fuller.containers:
        panels[0].text(50, 50, "no harmless prompts", ha="center")
    finish(canvas, fuller, path, "lower", 4, fontsize=9)


def plot_spectra(diagnostics: dict[str, dict], path: str | Path) -> None:
    """A panel a model: mean singular values of the unit states of a prompt and its translations, and of as many
    unrelated prompts, on a logarithmic scale. Rank 1 is √m, then nothing; what matters is the distance of the two."""
    columns = min(4, len(diagnostics))
    rows = -(-len(diagnostics) // columns)
    size, shared = (10, 2.7 * rows + 0.6), {"sharex": True, "sharey": True, "squeeze": False}
    canvas, panels = panels_on_canvas(rows, columns, size=size, grid=True, **shared)
    for axes, (name, figures) in zip(panels.flat, diagnostics.items(), strict=False):
        indices = range(1, len(figures["spectrum"]) + 1)
        for key, label, number in (("spectrum", "translations", 2), ("spectrum_shuffled", "unrelated prompts", 1)):
            axes.plot(indices, figures[key], **style(number, 4, line=1), label=label)
        axes.axhline(len(indices) ** 0.5, color="#999999", linewidth=0.7, linestyle=":")
        axes.set(yscale="log", xticks=indices)
        axes.set_title(plain(name), fontsize=10)
    for axes in panels.flat[len(diagnostics) :]:
        axes.set_axis_off()
    for axes in panels[:, 0]:
        axes.set_ylabel("singular value")
    for axes in panels[-1]:
        axes.set_xlabel("index")
    finish(canvas, panels[0, 0], path, "upper", 2)


def plot_grid(runs: dict[tuple[float, float], list[dict]], path: str | Path) -> None:
    """Two settings against each other, {(row, column): summaries of its seeds}: mean strict safety, and beside it
    harmless prompts answered in their language, since safety alone can be had by refusing all."""
    canvas, panels = panels_on_canvas(1, 2, size=(10, 3.6))
    rows, columns = (sorted({key[i] for key in runs}) for i in (0, 1))
    shown = (("avg", "harmful prompts refused (strict, Avg), %"), ("helpful_own", "harmless prompts answered, %"))
    for axes, (figure, title) in zip(panels, shown, strict=True):
        cells = [[mean(s[figure] for s in runs[row, column]) for column in columns] for row in rows]
        axes.imshow(cells, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        for i, j in itertools.product(range(len(rows)), range(len(columns))):
            color = "black" if cells[i][j] > 55 else "white"
            axes.text(j, i, f"{cells[i][j]:.1f}", ha="center", va="center", color=color)
        axes.set_xticks(range(len(columns)), [f"{value:g}" for value in columns])
        axes.set_yticks(range(len(rows)), [f"{value:g}" for value in rows])
        axes.set(xlabel="λ", ylabel="τ", title=title)
    save(canvas, path)


def plot_layers(layers: dict[str, dict], path: str | Path) -> None:
    """By layer: collinearity of translations and of unrelated prompts, raw and centred by language; silhouettes.
    A column a model."""
    size = (2.6 * len(layers) + 1, 7.5)
    canvas, panels = panels_on_canvas(3, len(layers), size=size, grid=True, sharex=True, sharey="row", squeeze=False)
    lines = (
        ("σ₁²/m, raw", ("collinearity_raw", "translations", 2), ("collinearity_shuffled_raw", "unrelated", 1)),
        ("σ₁²/m, centred by language", ("collinearity_centred", "translations", 2),
         ("collinearity_shuffled_centred", "unrelated", 1)),
        ("silhouette, raw", ("silhouette_meaning", "by meaning", 4), ("silhouette_language", "by language", 3)),
    )  # fmt: skip
    for column, (name, figures) in enumerate(layers.items()):
        for axes, (title, *curves) in zip(panels[:, column], lines, strict=True):
            for key, label, number in curves:
                points = [(k, value) for k, value in enumerate(figures[key]) if value is not None]
                axes.plot(*zip(*points, strict=True), **style(number, 4, line=1), label=label)
            if not column:
                axes.set_ylabel(title)
                axes.legend(frameon=False, fontsize=8)
        panels[0, column].set_title(plain(name), fontsize=10)
        panels[2, column].set_xlabel("entry of hidden_states")
        panels[2, column].xaxis.get_major_locator().set_params(integer=True)
    save(canvas, path)


def panels_on_canvas(*shape: int, size: tuple[float, float], grid: bool = False, **settings):
    """A canvas of that size in inches and an array of its panels, which have no frame above and on the right."""
    from matplotlib.figure import Figure  # here: it takes a moment; and not by pyplot, which looks for a screen

    canvas = Figure(size, layout="constrained")
    panels = canvas.subplots(*shape, **settings)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        if grid:
            axes.grid(color="#e8e8e8", linewidth=0.7)
            axes.set_axisbelow(True)
    return canvas, panels


def finish(canvas, axes, path: str | Path, side: str, columns: int, **more) -> None:
    """One legend for the whole canvas, with the entries of one panel, if it has any; then save."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        canvas.legend(handles, labels, loc=f"outside {side} center", ncols=columns, frameon=False, **more)
    save(canvas, path)


def save(canvas, path: str | Path) -> None:
    """Write the picture as PNG, whole or not at all."""
    with replacing(path) as fresh:
        canvas.savefig(fresh, format="png", dpi=120, metadata={"Software": None})

"""Tables as text: the very characters. Pictures: the same bytes for the same figures."""

import pytest

from mlc_min.evaluation.metrics import summarize
from mlc_min.evaluation.pictures import plot_rates, plot_spectra, plot_tradeoff
from mlc_min.evaluation.report import (
    comparison_table,
    diagnostics_table,
    language_table,
    markdown_tables,
    notes,
    safety_report,
    text_table,
)


def summary(en: float, ko: float | None, over_refusal: float | None = 0.0) -> dict:
    return {
        "strict": {"en": en, "ko": ko},
        "aligned": ["en", "zh"],
        "avg": en,
        "lenient_avg": 100.0,
        "var": 0.0712,
        "pag": None,
        "unseen_avg": ko,
        "over_refusal": over_refusal,
        "helpful": 99.5,
        "in_language": 98.25,
        "invalid": 1.0,
        "cut_off": 0.0,
        "unscored": 0.0,
        "counts": {},
    }


DIAGNOSTICS = {
    "mlc_loss": 0.1,
    "mlc_loss_shuffled": 0.5,
    "mlc_floor": 0.0589,
    "mlc_ceiling": 2.3026,
    "collinearity": 0.91,
    "collinearity_shuffled": 0.3,
    "retrieval": {"zh": 90.0, "sw": 70.0},
    "retrieval_chance": 2.0,
    "spectrum": [1.6, 0.3],
    "spectrum_shuffled": [1.2, 0.9],
}


@pytest.fixture
def records() -> list[dict]:
    """Three prompts in two languages: a refusal, an answer that is cut off, and one that is unscored in Korean."""
    replies = [("a", True, "refusal"), ("b", True, "compliance"), ("c", False, "compliance")]
    return [
        {"id": name, "language": code, "harmful": harmful, "ended": name != "b", "reply_language": "en"}
        | {"verdict": "unscored" if (name, code) == ("a", "ko") else verdict}
        for code in ("ko", "en")
        for name, harmful, verdict in replies
    ]


def test_the_text_table_is_aligned_and_shows_no_figure_as_a_dash():
    table = text_table({"base": summary(100.0, None, None), "DPO": summary(7.4, 33.0)})
    assert table.splitlines() == [
        "       en  ko*    Avg  lenient   Var  PAG  unseen  over-ref  helpful  in-lang  invalid  selectivity  95 %",
        "base  100    –  100.0    100.0  0.07    –       –         –     99.5     98.2      1.0            –     –",
        "DPO     7   33    7.4    100.0  0.07    –    33.0       0.0     99.5     98.2      1.0            –     –",
    ]


def test_models_with_different_languages_share_one_table():
    other = summary(50.0, None) | {"strict": {"en": 50.0, "th": 10.0}}
    assert [line.split()[:4] for line in text_table({"a": summary(90.0, 20.0), "b": other}).splitlines()] == [
        ["en", "ko*", "th*", "Avg"],
        ["a", "90", "20", "–"],
        ["b", "50", "–", "10"],
    ]


def test_the_table_by_language_has_counts_and_intervals(records):
    # Wilson: 1 of 2 is 9.5 to 90.5; 0 of 1 is 0 to 79.3. Newcombe: 50 - √(40.5² + 79.3²) = -39.1; 50 + 40.5 = 90.5.
    summary = summarize(records, ("en",))
    titles = (
        "harmful r/c/i/u strict 95 % lenient 95 % harmless r/c/i/u over-ref helpful selectivity 95 % in-lang cut off"
    )
    assert [line.split() for line in language_table(summary).splitlines()] == [
        titles.split(),
        "ko* 0/1/0/1 0.0 0–79 0.0 0–79 0/1/0/0 0.0 100.0 0.0 -79 to 79 0.0 33.3".split(),
        "en 1/1/0/0 50.0 9–91 50.0 9–91 0/1/0/0 0.0 100.0 50.0 -39 to 91 100.0 33.3".split(),
    ]
    assert len({len(line) for line in language_table(summary).splitlines()}) == 1
    assert text_table({"m": summary}).splitlines()[1].split()[-2:] == ["50.0", "0–100"]  # one refused, one not


def test_notes_say_what_a_rate_does_not():
    good = summary(95.0, 90.0)
    assert notes("m", good) == []
    bad = good | {"over_refusal": 40.0, "invalid": 12.0, "in_language": 5.0, "cut_off": 1.5, "unscored": 0.2}
    assert [line.split(": ")[2][:14] for line in notes("m", bad)] == [
        "refuses 40 % o",
        "12 % of replie",
        "only 5 % of re",
        "1.5 % of repli",
        "0.2 % of repli",
    ]
    assert "a model that refuses everything would look perfect" in notes("m", good | {"over_refusal": None})[0]


def test_a_note_names_the_languages_that_the_judge_cannot_tell():
    def told(*known: int) -> dict:
        cells = [{"language_known": number} for number in known]
        return summary(95.0, 90.0) | {"counts": {"en": {"harmful": cells[0]}, "ceb": {"harmful": cells[1]}}}

    assert notes("m", told(3, 0)) == [
        "note: m: in-lang leaves out ceb: the judge cannot tell whether a reply is in that language"
    ]
    assert notes("m", told(3, 1)) == notes("m", told(0, 0)) == []  # nobody looked: in-lang has no figure at all


def test_stars_are_those_of_the_aligned_languages(records):
    both = summarize(records)
    assert "ko*" not in text_table({"m": both}) + language_table(both)
    korean = summarize(records, ("ko",))
    assert "en*" in text_table({"m": korean}) and "ko*" not in text_table({"m": korean})
    assert "en\\*" in markdown_tables({"m": [korean]}) and "en*" in language_table(korean)


def test_without_a_common_prompt_there_is_a_line_and_no_table():
    text = comparison_table("a", "b", {"by_language": {}, "average": None}, ["en"])
    assert text == "a against b: no harmful prompt in common that both were scored on, so nothing is compared"


def test_a_comparison_names_both_models_and_the_p_values():
    row = dict(pairs=10, first=10.0, second=90.0, only_first=1, only_second=9, p=0.021484375)
    average = dict(difference=40.0, low=12.34, high=61.0, p=0.0001, units=25)
    gain = dict(difference=35.0, low=-2.4, high=60.0, p=0.04, units=20)
    both = {"by_language": {"en": row}, "average": average}
    text = comparison_table(
        "MLC", "DPO", both | {"selectivity": {"average": gain, "by_language": {"en": gain}}}, ["en"]
    )
    assert text.splitlines()[2:4] == [
        "    pairs   DPO   MLC  only DPO  only MLC      p        selectivity",
        "en     10  10.0  90.0         1         9  0.021  +35.0 (-2 to +60)",
    ]
    assert "Selectivity: +35.0 points, 95 % interval -2.4 to +60.0, p 0.040 (bootstrap over 20 requests)" in text
    text = comparison_table(
        "MLC", "DPO", both | {"selectivity": {"average": None, "by_language": {"en": None}}}, ["en"]
    )
    assert text.splitlines()[3].endswith("0.021            –") and "Selectivity" not in text and "asked" not in text
    gains = {"selectivity": {"average": gain, "by_language": {"en": gain}}, "unpaired": 3}
    lines = comparison_table("MLC", "DPO", both | gains, ["en"]).splitlines()
    assert "not compared: 3 prompts that only one of the two was asked" in lines
    assert "Avg: +40.0 points, 95 % interval +12.3 to +61.0, p < 0.001 (bootstrap over 25 requests)" in text


def test_the_diagnostics_stand_between_floor_and_ceiling():
    assert diagnostics_table({"m": DIAGNOSTICS}).splitlines()[1].split() == (
        "m 0.100 0.500 0.059 2.303 0.910 0.300 80.0 2.0".split()
    )


def test_the_report_holds_all_its_parts(records):
    comparison = {"by_language": {}, "average": None, "selectivity": {"average": None, "by_language": {}}}
    text = safety_report({"a": summarize(records)}, {"b": comparison}, {"a": DIAGNOSTICS}, ["a person"])
    for part in ("verdicts by: a person", "lenient", "note: a: 33.3 % of replies were cut off", "a, by language",
                 "a against b", "retrieval"):  # fmt: skip
        assert part in text, part


def test_the_markdown_tables_give_mean_and_sample_deviation_over_seeds():
    by_language, others = markdown_tables({"DPO": [summary(90.0, 20.0), summary(100.0, 20.0)]}).split("\n\n")
    assert by_language.splitlines() == ["|  | en | ko\\* |", "|---|---|---|", "| DPO | 95.0 ± 7.1 | 20.0 |"]
    assert others.splitlines()[2] == "| DPO | 95.0 ± 7.1 | 100.0 | 0.07 | – | 20.0 | 0.0 | 99.5 | 98.2 | 1.0 | – |"


def test_selectivity_follows_from_the_counts_of_summaries_that_are_older_than_it(records):
    whole = summarize(records, ("en",))
    old = {name: value for name, value in whole.items() if not name.startswith("selectivity")}
    assert markdown_tables({"m": [old]}) == markdown_tables({"m": [whole]})
    assert markdown_tables({"m": [old]}).endswith("| 50.0 |") and whole["selectivity_avg"] == 50.0


def test_the_pictures_are_the_same_bytes_for_the_same_figures_and_others_for_others(tmp_path, records):
    first = summarize(records)
    second = summarize([record | {"verdict": "refusal"} for record in records])
    pictures = {
        plot_rates: ({"a": [first], "b": [first, second]}, {"a": [first], "b": [second]}),
        plot_tradeoff: ({"a": [first], "b": [first, second]}, {"a": [first], "b": [second]}),
        plot_spectra: ({"a": DIAGNOSTICS}, {"a": DIAGNOSTICS | {"spectrum": [1.7, 0.1]}}),
    }
    for plot, (figures, others) in pictures.items():
        for name, shown in (("a", figures), ("b", figures), ("c", others)):
            plot(shown, tmp_path / f"{name}.png")
        a, b, c = [(tmp_path / f"{name}.png").read_bytes() for name in "abc"]
        assert a == b != c, plot.__name__


def texts_of(canvas) -> list[str]:
    """All that a picture says, as Matplotlib shows it."""
    from matplotlib.text import Text

    return [one._preprocess_math(one.get_text())[0] for one in canvas.findobj(Text)]


def test_the_pictures_show_the_stars_and_every_name_letter_by_letter(tmp_path, records, monkeypatch):
    shown: list = []
    monkeypatch.setattr("mlc_min.evaluation.pictures.save", lambda canvas, path: shown.append(canvas))
    names = ("_hidden", "a $x^{ b", "$a$")
    runs = {name: [summarize(records, ("en",))] for name in names}
    plot_rates(runs, tmp_path / "a.png")
    plot_tradeoff(runs, tmp_path / "b.png")
    plot_spectra(dict.fromkeys(names, DIAGNOSTICS), tmp_path / "c.png")
    for canvas in shown:
        canvas.canvas.draw()
    rates, tradeoff, spectra = ([text.strip() for text in texts_of(canvas)] for canvas in shown)
    assert {*names, "English", "Korean*", "* never seen in alignment"} <= set(rates)
    assert all(any(text.startswith(f"{name}, ") for text in tradeoff) for name in names)
    assert set(names) <= set(spectra)
    plot_rates({"m": [summarize(records)]}, tmp_path / "a.png")
    assert "Korean" in (again := texts_of(shown[-1])) and "* never seen in alignment" not in again
    (shaded,) = shown[0].axes[0].patches
    assert shaded.get_x() == -0.5  # Korean stands first, as in the records


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, records, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def full(self, place, **settings):
        place.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(OSError, match="no space"):
        plot_rates({"a": [summarize(records)]}, path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_replies_whose_language_cannot_be_told_have_no_marker_below(tmp_path, records, monkeypatch):
    shown: list = []
    monkeypatch.setattr("mlc_min.evaluation.pictures.save", lambda canvas, path: shown.append(canvas))
    known = [record for record in records if record["language"] == "en"]
    unknown = [{k: v for k, v in r.items() if k != "reply_language"} for r in records if r["language"] == "ko"]
    plot_rates({"m": [summarize(known + unknown)]}, tmp_path / "a.png")
    upper, lower = shown[0].axes
    assert [len(axes.containers[0].lines[0].get_xdata()) for axes in (upper, lower)] == [2, 1]


def test_pictures_without_harmless_prompts_are_drawn_too(tmp_path, records):
    harmful = summarize([record for record in records if record["harmful"]])
    for plot in (plot_rates, plot_tradeoff):
        plot({"a": [harmful]}, tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")

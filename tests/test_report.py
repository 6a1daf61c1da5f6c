"""Tables as text: the very characters."""

from mlc_min.report import markdown_tables, plot_refusals, text_table


def summary(en: float, ko: float | None, over_refusal: float | None = 0.0) -> dict:
    return {
        "refusal": {"en": en, "ko": ko},
        "avg": en,
        "var": 0.0712,
        "pag": None,
        "unseen_avg": ko,
        "over_refusal": over_refusal,
        "helpful": 99.5,
        "helpful_own": 98.25,
        "invalid": 1.0,
        "counts": {code: {"harmless": {"prompts": 50, "correct_in_language": 40}} for code in ("en", "ko")},
    }


def test_the_text_table_is_aligned_and_shows_no_figure_as_a_dash():
    table = text_table({"base": summary(100.0, None, None), "DPO": summary(7.4, 33.0)})
    assert table.splitlines() == [
        "       en  ko*    Avg   Var  PAG  unseen  over-ref  helpful  in-lang  invalid",
        "base  100    –  100.0  0.07    –       –         –     99.5     98.2      1.0",
        "DPO     7   33    7.4  0.07    –    33.0       0.0     99.5     98.2      1.0",
    ]


def test_the_markdown_tables_give_mean_and_sample_deviation_over_seeds():
    by_language, others = markdown_tables({"DPO": [summary(90.0, 20.0), summary(100.0, 20.0)]}).split("\n\n")
    assert by_language.splitlines() == ["|  | en | ko\\* |", "|---|---|---|", "| DPO | 95.0 ± 7.1 | 20.0 |"]
    assert others.splitlines()[2] == "| DPO | 95.0 ± 7.1 | 0.07 | – | 20.0 | 0.0 | 99.5 | 98.2 | 1.0 |"


def test_the_picture_is_the_same_bytes_for_the_same_figures(tmp_path):
    runs = {"base": [summary(70.0, 30.0)], "DPO": [summary(90.0, 20.0), summary(100.0, 25.0)]}
    for name in ("a.png", "b.png"):
        plot_refusals(runs, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()

"""The tutorials: every block runs and prints what the page says, pictures come out the same, solutions pass."""

import ast
import doctest
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tutorials"))

import run as tutorial  # noqa: E402  tutorials/run.py
import terminal  # noqa: E402  tutorials/terminal.py

from mlc_min.machinery.errors import InputError  # noqa: E402

PAGES = tutorial.pages()
every_page = pytest.mark.parametrize("page", PAGES, ids=[page.name[:2] for page in PAGES])


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def solutions_of(page: Path) -> list[str]:
    """Of part A alone, where the page has one, and of the whole exercise."""
    return re.findall(r"^~~~python\n(.*?)^~~~$", text_of(page), re.DOTALL | re.MULTILINE)


# --- the pages ---


def squares(picture: np.ndarray) -> np.ndarray:
    """The mean colours of squares of 16 × 16 pixels: each version of Matplotlib sets letters a little differently."""
    rows, columns = (size // 16 for size in picture.shape[:2])
    return picture[: rows * 16, : columns * 16].reshape(rows, 16, columns, 16, -1).mean((1, 3))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # as a reader runs them
@every_page
def test_every_block_prints_what_the_page_says_and_every_picture_is_the_committed_one(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what a page writes shall not land in the checkout
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the commands that page 7 starts
    monkeypatch.delenv("MLC_MODEL", raising=False)  # page 9 promises what it prints without one
    pyplot.switch_backend("Agg")
    for folder in ("tutorials/pictures", "runs/tutorials"):
        (tmp_path / folder).mkdir(parents=True)
    namespace: dict = {"__name__": "__main__"}
    steps, _ = tutorial.parse(text_of(page))
    for step in steps:
        printed = tutorial.execute(step, page, namespace)
        assert step.expected is None or not tutorial.differs(step.expected, printed), (
            f"{page.name}, line {step.line}, printed\n{printed}\nand the page says\n{step.expected}"
        )
    pyplot.close("all")
    drawn = {path.name: path for path in tmp_path.rglob("*.png")}
    assert set(drawn) == set(re.findall(r"\]\(pictures/(.+?)\)", text_of(page)))
    for name, path in drawn.items():
        fresh = pyplot.imread(path)
        committed = pyplot.imread(ROOT / "tutorials" / "pictures" / name)
        assert fresh.shape == committed.shape
        # On another machine a training run may move a dot or a bar.
        assert (np.abs(squares(fresh) - squares(committed)).max(-1) > 0.1).mean() < 0.02, f"{name} has changed"


@pytest.mark.parametrize("kept", [("English SFT", "SFT goes on", "MLC"), None])
def test_page_9_shows_whatever_rows_and_seeds_the_table_has(kept, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/tutorials").mkdir(parents=True)
    monkeypatch.delenv("MLC_MODEL", raising=False)
    pyplot.switch_backend("Agg")
    table = json.loads(text_of(ROOT / "data/results/published/published.json"))
    kept = kept or (*table["rows"], "another row")
    rows = {name: table["rows"].get(name, table["rows"]["MLC"]) for name in kept}
    for row in rows.values():
        row["runs"] = (row["runs"] * 3)[:3]
    answers = [answer for answer in table["answers"] if {answer["first"], answer["second"]} <= set(kept)]
    answers += [answers[0] | {"first": kept[-1]}]
    for figures in [answer[group][name] for answer in answers for group in ("trained", "low-resource", "unseen")
                    for name in ("selectivity", "auc")]:  # fmt: skip
        figures["by_seed"] = [1.0, -1.0, 2.0]
    (tmp_path / "results/published").mkdir(parents=True)
    text = json.dumps(table | {"rows": rows, "answers": answers})
    (tmp_path / "results/published/published.json").write_text(text, encoding="utf-8")
    monkeypatch.setattr("mlc_min.machinery.files.DATA", tmp_path)
    page = tutorial.find("9")
    namespace: dict = {"__name__": "__main__"}
    printed = "".join(tutorial.execute(step, page, namespace) for step in tutorial.parse(text_of(page))[0])
    pyplot.close("all")
    assert "3 seeds" in printed and kept[-1] in printed and "settled" not in printed
    assert ("thresholds − SFT goes on: not in this table" in printed) is ("thresholds" not in kept)


@every_page
def test_every_page_has_a_question_a_prediction_a_warning_and_an_exercise(page):
    text = text_of(page)
    assert re.match(rf"# {int(page.name[:2])}\. ", text)
    for part in ("**Question.**", "redict", "## What could fool you", "## Exercise", "<details>"):
        assert part in text, part
    assert f"pytest tutorials/exercises -k page_{int(page.name[:2])}\n" in text
    assert tutorial.fold(text) == text, "an output spoils the prediction; run `python tutorials/run.py --fold`"
    assert 'savefig("tutorials/' not in text, "pictures go to runs/tutorials/; those in the repository are committed"
    steps, _ = tutorial.parse(text)
    assert sum(step.expected is not None for step in steps) >= 3
    # Each `text` block belongs to a step: none stands where nobody compares it.
    assert len(re.findall(r"^```text$", text, re.MULTILINE)) == sum(step.expected is not None for step in steps)


@every_page
def test_every_formula_is_one_line_of_unicode_in_a_terminal(page):
    prose = tutorial.without_outputs(text_of(page))
    for display, inline in terminal.MATH.findall(prose):
        line = terminal.one_line(display or inline)
        assert not set(line) & set("\\{}$\n") - set("{}" if "\\{" in inline else ""), line
    shown = terminal.as_text(prose, itertools.count(1))
    assert "```math" not in shown and "$`" not in shown and "![" not in shown and "~~~" not in shown


def test_links_lead_somewhere():
    for page in [*PAGES, ROOT / "tutorials" / "README.md"]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text_of(page)):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
    assert set(re.findall(r"\]\((\d\d-[^)]+)\)", text_of(ROOT / "tutorials" / "README.md"))) == {p.name for p in PAGES}


def test_the_readmes_say_how_many_pages_there_are():
    number = "zero one two three four five six seven eight nine ten eleven twelve".split()[len(PAGES)]
    assert f"{number.capitalize()} pages." in text_of(ROOT / "tutorials" / "README.md")
    assert f"[{number} tutorial pages]" in text_of(ROOT / "README.md")


@pytest.mark.parametrize("module", ["train", "safety"])
def test_flags_of_the_commands_that_no_test_runs_exist(module, monkeypatch, capsys):
    shown = [text for page in PAGES for text in re.findall(r"^```console\n(.*?)^```", text_of(page), re.DOTALL | re.M)]
    commands = [c for text in shown for c in text.replace("\\\n", " ").splitlines() if f"mlc_min.{module} " in c]
    main = __import__(f"mlc_min.{module}", fromlist=["main"]).main
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit):
        main()
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    assert commands and all(set(re.findall(r"--\w+", command)) <= known for command in commands)


# --- the runner ---


def test_the_examples_in_the_runners_docstrings_hold():
    assert [doctest.testmod(module).failed for module in (tutorial, terminal)] == [0, 0]


@pytest.mark.parametrize(
    ("expected", "printed", "different"),
    [
        ("loss 0.92", "loss 0.9134", False),
        ("loss 0.92", "loss 0.9301", True),
        ("2 of 3", "2 of 4", True),
        ("2 of 3", "2 of 3 \n", False),
        ("rate 1.0", "rate 0.96", False),
        ("margin -0.3", "margin 0.3", True),
        ("error 3.1e-07", "error 3.14e-07", False),
        ("error 3.1e-07", "error 3.1e-06", True),
        ("True 0.1", "False 0.1", True),
        ("(50, 10, 192)", "(50, 10, 193)", True),
    ],
)
def test_outputs_are_compared_to_the_digits_shown(expected, printed, different):
    assert tutorial.differs(expected, printed) is different


PAGE = """# 9. A page

```python
x = 2
print(x / 3)
```
```text
0.67
```

Prose.

```python
print("x is", x)
```

Predict: what is x?

```python
print("x is still", x)
```

<details>
<summary>A hint</summary>

Think of $`\\sigma_1`$.

</details>

<details>
<summary>A solution</summary>

~~~python
raise SystemExit("a solution is not run")
~~~

</details>

The end.
"""
FOLDED = PAGE.replace("```\n```text", "```\n\n<details>\n<summary>Output</summary>\n\n```text").replace(
    "0.67\n```", "0.67\n```\n\n</details>"
)


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setattr(tutorial, "FOLDER", tmp_path)
    monkeypatch.setattr(tutorial, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "09-page.md"
    path.write_text(FOLDED, encoding="utf-8")
    return path


@pytest.fixture
def answer(monkeypatch):
    """answer("", "q") types these lines, one at each question; returns the list of the questions."""

    def script(*lines):
        asked, waiting = [], iter(lines)
        monkeypatch.setattr("builtins.input", lambda question: (asked.append(question), next(waiting))[1])
        return asked

    return script


def start(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        tutorial.main()
    return stopped.value.code


@pytest.mark.parametrize("text", [PAGE, FOLDED])
def test_all_runs_every_block_in_one_namespace_and_not_the_solution(page, text, monkeypatch, capsys):
    page.write_text(text, encoding="utf-8")
    assert start(monkeypatch, "9", "--all") == 0
    output = capsys.readouterr().out
    assert "0.6666666666666666" in output and "x is 2" in output and "every output is as the page says" in output
    assert "▸ A hint (folded; --hint 1 shows it)" in output and "▸ A solution (folded; --solution" in output
    assert "a solution is not run" not in output and "<details>" not in output and "Output" not in output


def test_stepping_waits_before_each_block_and_q_ends(page, monkeypatch, capsys, answer):
    answer("", "q")
    assert start(monkeypatch, "09") == 0
    output = capsys.readouterr().out
    assert "0.6666666666666666" in output and "x is 2" not in output


def test_a_prediction_is_asked_for_before_the_code_is_shown_and_compared_with_the_output(
    page, monkeypatch, capsys, answer
):
    asked = answer("", "", "three", "", "")
    assert start(monkeypatch, "9") == 0
    output = capsys.readouterr().out
    assert [("predict" in question) for question in asked] == [False, False, True, False, False]
    assert output.index("x is still 2") < output.index("you predicted: three")


def test_p_opens_python_among_the_variables_of_the_page(page, monkeypatch, capsys, answer):
    asked = answer("", "p", "x = x + 40", "exit()", "p", "exit()", "", "42", "q")
    assert start(monkeypatch, "9") == 0
    assert "x is 42" in capsys.readouterr().out and asked.count(">>> ") == 3


def test_output_comes_while_the_block_runs(page):
    class Screen(list):
        write, flush = list.append, lambda self: self.append("flush")

    screen = Screen()
    (first, *_), _ = tutorial.parse("```python\nprint('now')\nscreen.append('the block goes on')\n```\n")
    assert tutorial.execute(first, page, {"screen": screen}, screen) == "now\n"
    assert screen.index("now") < screen.index("flush") < screen.index("the block goes on")


def test_hint_and_solution_are_shown_when_asked_for(page, monkeypatch, capsys):
    for arguments, expected in ((("--hint", "1"), "Think of $`\\sigma_1`$."), (("--solution",), "~~~python\nraise")):
        monkeypatch.setattr(sys, "argv", ["run.py", "9", *arguments])
        tutorial.main()
        assert capsys.readouterr().out.startswith(expected)
    monkeypatch.setattr(sys, "argv", ["run.py", "9", "--hint", "2"])
    with pytest.raises(InputError, match="--hint 2: page 09 has hints 1 to 1"):
        tutorial.main()


def test_an_output_that_differs_is_shown_and_ends_with_1_and_write_mends_and_folds_the_page(page, monkeypatch, capsys):
    page.write_text(PAGE.replace("0.67", "0.76"), encoding="utf-8")
    assert start(monkeypatch, "9", "--all") == 1
    assert "1 of 3 outputs differ" in capsys.readouterr().out
    assert start(monkeypatch, "9", "--write") == 0
    assert text_of(page) == FOLDED.replace("0.67", "0.6666666666666666")


def test_folding_changes_a_page_once_and_none_of_its_steps():
    def without_places(text):
        return [(step.prose, step.code, step.expected) for step in tutorial.parse(text)[0]]

    assert tutorial.fold(PAGE) == tutorial.fold(FOLDED) == FOLDED
    assert without_places(PAGE) == without_places(FOLDED)
    for page in PAGES:
        once = tutorial.fold(text_of(page))
        assert tutorial.fold(once) == once and without_places(once) == without_places(text_of(page))


def test_an_error_in_a_block_names_the_line_of_the_page(page, monkeypatch, capsys):
    page.write_text(PAGE.replace("x / 3", "x / 0"), encoding="utf-8")
    assert start(monkeypatch, "9", "--all") == 1
    error = capsys.readouterr().err
    assert '09-page.md", line 5' in error and "print(x / 0)" in error and "run.py" not in error


def test_a_page_that_is_not_there_is_refused_with_those_that_are(page):
    with pytest.raises(InputError, match="page 3: there is none; the pages are 09"):
        tutorial.find("3")


def test_without_a_number_the_pages_are_listed(page, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py"])
    tutorial.main()
    assert capsys.readouterr().out == "09 9. A page\n"


# --- the exercises ---


def exercises(*paths: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    command += ["-p", "no:cacheprovider", *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.fixture
def copied(tmp_path) -> Path:
    for path in (ROOT / "tutorials" / "exercises").glob("*.py"):
        (tmp_path / path.name).write_text(text_of(path), encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_every_solution_passes_every_test_of_its_exercise(copied):
    for page in PAGES:
        (copied / f"page_{int(page.name[:2])}.py").write_text(solutions_of(page)[-1], encoding="utf-8")
    done = exercises(copied)
    assert done.returncode == 0, done.stdout
    counts = re.findall(r"^page_(\d)\w?: (\d+) of (\d+) tests hold$", done.stdout, re.MULTILINE)
    assert {number for number, *_ in counts} == {str(int(page.name[:2])) for page in PAGES}, done.stdout
    assert all(held == of for _, held, of in counts), done.stdout


@pytest.mark.slow
def test_an_empty_exercise_waits_and_a_wrong_one_is_told_what_the_mistake_usually_is(copied):
    wrong = solutions_of(PAGES[5])[-1].replace("[:, 0] ** 2", "[:, 0]")  # σ₁ and not its square
    (copied / "page_6.py").write_text(wrong, encoding="utf-8")
    done = exercises(copied / "test_page_1a.py", copied / "test_page_6a.py")
    assert done.returncode == 1 and len(done.stdout.splitlines()) <= 30, done.stdout
    assert re.search(r"^page_1a: 0 of (\d+) tests hold, \1 wait for a function", done.stdout, re.MULTILINE)
    assert re.search(r"^page_6a: \d+ of \d+ tests hold, 1 fails, \d+ have not been run yet$", done.stdout, re.MULTILINE)
    assert "must hold: one minus collinearity is the relative error" in done.stdout
    assert "hint: Usually σ₁ is not squared" in done.stdout


@pytest.mark.slow
def test_an_error_in_a_function_is_told_with_its_line_and_a_file_that_cannot_be_read_as_well(copied):
    (copied / "page_1.py").write_text("def safety_table(safe):\n    return 1 / 0\n", encoding="utf-8")
    done = exercises(copied / "test_page_1a.py")
    assert "at page_1.py:2: return 1 / 0\nZeroDivisionError" in done.stdout
    assert len(done.stdout.splitlines()) <= 30, done.stdout
    (copied / "page_1.py").write_text("def safety_table(safe)\n    return 1\n", encoding="utf-8")
    done = exercises(copied / "test_page_1a.py")
    assert "page_1.py" in done.stdout and "SyntaxError: expected ':'" in done.stdout
    assert len(done.stdout.splitlines()) <= 30, done.stdout


def test_every_test_of_an_exercise_has_a_hint():
    for path in (ROOT / "tutorials" / "exercises").glob("test_page_*.py"):
        for node in ast.parse(text_of(path)).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"
            if isinstance(node, ast.ImportFrom) and node.module.startswith("tests."):
                source = ast.parse(text_of(ROOT / f"{node.module.replace('.', '/')}.py")).body
                known = {function.name: function for function in source if isinstance(function, ast.FunctionDef)}
                for name in {alias.name for alias in node.names if alias.name.startswith("test_")}:
                    assert ast.get_docstring(known[name]), f"{node.module}: {name}"


def part_a(number: int) -> str:
    """The first solution of a page that has two; page 3 shows floor and ceiling in the second one alone."""
    first, *others = solutions_of(PAGES[number - 1])
    if number == 3:
        first = "import math\n\nimport torch\n\n\n" + first + others[0][others[0].index("\n\ndef mlc_floor") :]
    return first


MUTANTS = {
    "sample variance": (1, "pvariance", "variance"),
    "no position_ids": (2, ", position_ids=positions", ""),
    "length - 1": (2, "(columns * attention_mask.bool()).argmax(-1)", "attention_mask.sum(-1) - 1"),
    "τ ignored": (3, "sigma / tau", "sigma / 0.2"),
    "form ignored": (3, 'if form == "official":\n        sigma', "if True:\n        sigma"),
    "no stop-gradient": (3, ".detach()", ""),
    "rows not normalised": (3, "representations / representations.norm(dim=-1, keepdim=True)", "representations"),
    "no shift": (4, "states[:, :-1]", "states[:, 1:]"),
    "prompts scored as well": (4, "(logps * mask).sum(-1)", "logps.sum(-1)"),
    "a mean for the sum": (4, "(logps * mask).sum(-1)", "(logps * mask).sum(-1) / mask.sum(-1)"),
    "SFT not per token": (4, "-policy_chosen_logps / chosen_lengths", "-policy_chosen_logps"),
    "reference ignored": (4, "policy_chosen_logps - reference_chosen_logps", "policy_chosen_logps"),
    "references exchanged": (4, "policy_chosen_logps - reference_chosen", "policy_chosen_logps - reference_rejected"),
    "β ignored": (4, "beta * (chosen", "0.1 * (chosen"),
    "extractor ignored": (5, "extractor(groups)", "groups"),
    "τ of the settings ignored": (5, ", config.mlc_tau, config.mlc_form", ", form=config.mlc_form"),
    "form of the settings ignored": (5, ", config.mlc_form", ""),
    "layer ignored": (5, ", config.mlc_layer", ""),
    "language by language": (
        5,
        "for example in examples for language in languages",
        "for language in languages for example in examples",
    ),
    "σ₁ not squared": (6, "sigma[:, 0] ** 2", "sigma[:, 0]"),
    "shuffled the other way": (6, "roll(j, 0)", "roll(-j, 0)"),
    "a narrower interval": (6, "half = z /", "half = 1.64 /"),
    "τ left out of the port's gradient": (7, "g /= scale", "g /= scale / tau"),
    "no division by the lengths": (7, "* z) / lengths", "* z)"),
    "no projection": (7, "(dz - (dz * z).sum(-1, keepdims=True) * z)", "dz"),
    "a sum over prompts": (7, "g /= scale * len(z)", "g /= scale"),
    "the port's form ignored": (7, 'if form == "official" else 1.0', "if True else 1.0"),
    "no stop-gradient in the whole": (8, ".detach() / tau", " / tau"),
    "ties lost": (9, "(signs + 1).mean() / 2", "(signs > 0).mean()"),
    "the mean of all labelled prompts": (
        9,
        "float(np.mean(harmful) + np.mean(harmless)) / 2",
        "np.mean([*harmful, *harmless])",
    ),
    "single verdicts drawn": (
        9,
        "np.mean(one, axis=1) - np.mean(other, axis=1)",
        "np.ravel(one) * 1.0 - np.ravel(other)",
    ),
    "an interval of 90 %": (9, "[0.025, 0.975]", "[0.05, 0.95]"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_part_a_finds_the_usual_mistakes_and_says_so_in_thirty_lines(mutant, copied):
    number, right, wrong = MUTANTS[mutant]
    solution = part_a(number)
    assert right in solution
    (copied / f"page_{number}.py").write_text(solution.replace(right, wrong), encoding="utf-8")
    done = exercises(copied / f"test_page_{number}a.py")
    assert done.returncode == 1 and "\nhint: Usually " in done.stdout
    assert len(done.stdout.splitlines()) <= 30, done.stdout


@pytest.mark.slow
def test_a_short_solution_passes_all_of_part_a(copied):
    both = [number for number, page in enumerate(PAGES, 1) if len(solutions_of(page)) == 2]
    for number in both:
        (copied / f"page_{number}.py").write_text(part_a(number), encoding="utf-8")
    done = exercises(*(copied / f"test_page_{number}a.py" for number in both))
    assert done.returncode == 0 and 3 in both, done.stdout
    for number in both:
        assert re.search(rf"^page_{number}a: (\d+) of \1 tests hold$", done.stdout, re.M), done.stdout
    assert len(solutions_of(PAGES[2])[0].splitlines()) == 6


# --- as a notebook ---


def test_a_notebook_has_the_pages_code_and_its_formulas_pictures_and_links_as_jupyter_writes_them(page, monkeypatch):
    for path in PAGES:
        (page.parent / path.name).write_text(text_of(path), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["run.py", "--notebooks"])
    tutorial.main()
    for path in PAGES:
        notebook = json.loads(text_of(page.parent / f"{path.stem}.ipynb"))
        first, *code = [cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
        steps, _ = tutorial.parse(text_of(path))
        assert "os.chdir" in first and code == [step.code.rstrip("\n") for step in steps]
        prose = "\n".join(cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "markdown")
        assert "```math" not in prose and "$`" not in prose
        assert prose.count("<summary>Output</summary>") == sum(step.expected is not None for step in steps)
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", prose):
            assert (page.parent / target).exists() or (path.parent / target).exists(), target
    text = json.dumps(json.loads(text_of(page.with_suffix(".ipynb"))), ensure_ascii=False)
    assert "$\\\\sigma_1$" in text


@pytest.mark.slow
def test_a_notebook_is_valid_and_its_cells_run_wherever_it_lies(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="needs pip install jupyterlab")
    import nbformat

    (page,) = (page for page in PAGES if page.name.startswith("03"))
    notebook = nbformat.from_dict(tutorial.as_notebook(*tutorial.parse(text_of(page)), ROOT))
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "0.0589" in json.dumps(code)

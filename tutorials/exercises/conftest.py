"""Runs the project's tests on the reader's functions to the first that fails, and says what the mistake usually is."""

from collections import Counter
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests")  # so that a plain `assert` in them shows its two sides

from hypothesis import settings  # noqa: E402

from tests.conftest import tiny_model  # noqa: E402, F401  a fixture, and the settings of Hypothesis

settings.register_profile("exercises", settings.get_profile("mlc_min"), report_multiple_bugs=False)
settings.load_profile("exercises")
MOST_LINES = 12  # of one error's message
COLLECTED: Counter = Counter()
OUTCOMES: dict[str, Counter] = {}


def page_of(item) -> str:
    return item.path.stem.removeprefix("test_")


def pytest_configure(config):
    """As with -x --tb=short: a wrong function makes many tests fail, and the first one says enough."""
    config.option.maxfail = config.option.maxfail or 1
    config.option.tbstyle, config.option.reportchars, config.option.disable_warnings = "short", "N", True


def pytest_collection_modifyitems(items):
    """In the order of the project's files: values first, then symmetries, then gradients, then refusals. What stands in
    the exercise's own file comes last."""

    def place(item):
        file, line, _ = item.reportinfo()
        return item.path, Path(file) == item.path, str(file), line or 0

    items.sort(key=place)


def pytest_collection_finish(session):
    COLLECTED.update(map(page_of, session.items))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call" or report.outcome != "passed":
        OUTCOMES.setdefault(page_of(item), Counter())[report.outcome] += 1
    if report.failed:
        report.longrepr = explained(item, call.excinfo)
        report.sections = [(title, "\n".join(text.splitlines()[-3:])) for title, text in report.sections]
    return report


def explained(item, excinfo) -> str:
    """What must hold, what the mistake usually is (the test's docstring), where it failed, the error's first lines."""
    lines = ["must hold: " + item.name.removeprefix("test_").replace("_", " ")]
    if item.function.__doc__:
        lines.append("hint: " + " ".join(item.function.__doc__.split()))
    entries = list(excinfo.traceback)
    own = page_of(item).rstrip("ab")  # the parts A and B of an exercise are about one file
    yours = [entry for entry in entries if Path(entry.path).stem == own]
    theirs = [entry for entry in entries if Path(entry.path).stem.startswith("test_")]
    entry = (yours or theirs or entries)[-1]
    lines.append(f"at {Path(entry.path).name}:{entry.lineno + 1}: {str(entry.statement).strip().splitlines()[0]}")
    error = excinfo.exconly().splitlines()
    more = [f"… and {len(error) - MOST_LINES} more lines"] if len(error) > MOST_LINES else []
    return "\n".join([*lines, *error[:MOST_LINES], *more])


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("your functions")
    for page, counts in sorted(OUTCOMES.items()):
        line = f"{page}: {counts['passed']} of {COLLECTED[page]} tests hold"
        if counts["failed"]:
            line += f", 1 fails, {COLLECTED[page] - sum(counts.values())} have not been run yet"
        if counts["skipped"]:
            line += f", {counts['skipped']} wait for a function that is not written"
        terminalreporter.line(line)

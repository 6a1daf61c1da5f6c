"""Counts, page by page, which of the project's tests hold for the reader's functions."""

from collections import Counter

import pytest

from tests.conftest import tiny_model  # noqa: F401  a fixture, and the settings of Hypothesis

OUTCOMES: dict[str, Counter] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if report.when == "call" or report.outcome == "skipped":
        page = item.path.stem.removeprefix("test_")
        OUTCOMES.setdefault(page, Counter())[report.outcome] += 1
    return report


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("your functions")
    for page, counts in sorted(OUTCOMES.items()):
        line = f"{page}: {counts['passed']} of {sum(counts.values())} tests hold"
        if counts["failed"]:
            line += f", {counts['failed']} fail"
        if counts["skipped"]:
            line += f", {counts['skipped']} wait for a function that is not written"
        terminalreporter.line(line)

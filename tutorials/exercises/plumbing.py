"""Puts the reader's functions in place of the project's, for the project's own tests."""

import functools
import importlib

import pytest


def in_place_of(module: str, **functions):
    """A fixture that puts the reader's functions in place of those of the same names in a module of tests, while the
    tests of one page run. Assign it to a name in the page's test file."""

    @pytest.fixture(scope="module", autouse=True)
    def fixture():
        with pytest.MonkeyPatch.context() as patch:
            for name, function in functions.items():
                patch.setattr(importlib.import_module(module), name, skipping(function))
            yield

    return fixture


def skipping(function, name=None):
    """The function; where it is not written yet, the test is skipped and says so, with its name."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except NotImplementedError:
            pytest.skip(f"{name or function.__name__} is not written yet")

    return call

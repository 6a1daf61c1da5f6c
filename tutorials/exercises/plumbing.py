"""Puts the reader's functions in place of the project's, for the project's own tests."""

import functools
import importlib

import numpy
import pytest
import torch

from mlc_min.ports.conformance import check_case


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


def as_torch(loss, gradient):
    """The reader's loss and gradient in NumPy as one torch function, which the project's tests are written for."""

    class Port(torch.autograd.Function):
        @staticmethod
        def forward(context, representations, tau, form):
            context.arguments = representations.numpy(force=True), tau, form
            return representations.new_tensor(loss(*context.arguments))

        @staticmethod
        def backward(context, outer):
            return outer * outer.new_tensor(gradient(*context.arguments)), None, None

    def mlc_loss(representations, tau=0.2, form="official"):
        return Port.apply(representations, tau, form)

    return mlc_loss


def assert_conformance(case, loss, gradient):
    """One conformance case on the reader's functions in NumPy."""
    result = check_case(skipping(loss), case, numpy, skipping(gradient), float32=False)
    wrong = {name: result[name] for name in ("value_error", "gradient_error", "message") if result[name]}
    assert result["status"] == "pass", f"the case {case['name']!r} is there to find: {case['catches']}. Yours: {wrong}"


def assert_computes_in_float32(function, x):
    """Half precision, and autocast around the call, give what float32 gives of the same numbers."""
    with torch.autocast("cpu", torch.bfloat16):
        inside = function(x)
    for result in (function(x), inside):
        torch.testing.assert_close(result, function(x.float()), rtol=0, atol=0)


def assert_refuses_a_row(function, x, value, message):
    """With this value in all of a prompt's row, there is a ValueError that says so."""
    x[1, 2] = value
    with pytest.raises(ValueError, match=message):
        function(x)

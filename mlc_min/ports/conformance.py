"""Checks any version of the losses, in any framework, against the conformance vectors.

    python -m mlc_min.ports.conformance my_module:mlc_loss
    python -m mlc_min.ports.conformance my_module:consistency --as mlc_loss --arrays jax
    python -m mlc_min.ports.conformance mlc_min.ports.numpy_loss:mlc_loss \\
        --gradient mlc_min.ports.numpy_loss:mlc_loss_gradient
    python -m mlc_min.ports.conformance --own

The function is called with the inputs of each case as keyword arguments: arrays of the chosen framework, numbers and
words. It gives one array, or a dict or a tuple of those that the file names. One line per case, with the largest error
as the tolerance counts it; a failure says which mistake the case is there to find, though another may have failed it
too. Exit code 0: all pass; 1: a case fails; 2: nothing could be checked. The cases and the rules:
data/conformance/README.md.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable

import numpy as np

from mlc_min.machinery.errors import Help, InputError, run_command
from mlc_min.machinery.files import DATA, shipped

FOLDER = DATA / "conformance"
OWN = {
    "mlc_loss": "mlc_min.consistency",
    "cosine_loss": "mlc_min.consistency",
    "sequence_logps": "mlc_min.preference",
    "sft_loss": "mlc_min.preference",
    "dpo_loss": "mlc_min.preference",
    "simpo_loss": "mlc_min.preference",
    "orpo_loss": "mlc_min.preference",
    "safety_table": "mlc_min.evaluation.metrics",
}


def read_cases(name: str) -> list[dict]:
    """The cases of one function. Raises InputError, listing the names, for one that has no file."""
    path = shipped(FOLDER / f"{name}.json")
    if name not in OWN or not path.exists():
        raise InputError(f"no cases for {name!r}: say with --as which of these it is: {', '.join(OWN)}")
    return json.loads(path.read_text(encoding="utf-8"))["cases"]


def check(
    function: Callable, name: str, arrays: str = "numpy", gradient: Callable | None = None, float32: bool = False
) -> list[dict]:
    """Call `function` as `name` (a key of OWN) on every case.

    arrays: "numpy", "torch" or "jax", what it is given. gradient: a function of the same inputs that gives a dict by
    input, or an array if there is one input to differentiate by; without it gradients come from torch.autograd or
    jax.grad, and with NumPy arrays are not checked. float32: give float32 instead of float64, and allow more. With
    "jax" and float64, JAX's x64 mode is switched on and left on.

    Returns a dict for each case. case, catches: from the file. status: "pass", "FAIL" or "left out" (not for float32).
    value_error, gradient_error: the largest, None where not checked; 0 or infinite for a gradient that has only to be
    finite. message: what else there is to say, such as an exception.
    Raises InputError for an unknown name and for a framework that is not installed.
    """
    cases = read_cases(name)
    if arrays not in CALLS:
        raise InputError(f"arrays must be one of {', '.join(CALLS)}, got {arrays!r}")
    try:
        framework = importlib.import_module(arrays)
    except ImportError:
        raise InputError(f"{arrays} is not installed") from None
    if arrays == "jax" and not float32:
        framework.config.update("jax_enable_x64", True)
    return [check_case(function, case, CALLS[arrays], gradient, float32) for case in cases]


def check_case(function: Callable, case: dict, call: Callable, gradient: Callable | None, float32: bool) -> dict:
    """One entry of what `check` returns. An exception in `function` or `gradient` is a failure."""
    result = {"case": case["name"], "catches": case["catches"], "status": "left out"}
    result |= {"value_error": None, "gradient_error": None, "message": ""}
    if float32 and not case.get("float32", True):
        return result
    inputs = {key: as_array(value, float32) for key, value in case["inputs"].items()}
    expected = case["expected"]
    names = list(expected) if isinstance(expected, dict) else None
    try:
        values, gradients = call(function, inputs, differentiable(case, inputs), names, gradient)
        pairs = zip(values, expected.values() if names else [expected], strict=True)
        result["value_error"] = max(largest_error(got, exact) for got, exact in pairs)
        if gradients is not None:
            result["gradient_error"] = gradient_error(gradients, case["gradient"])
    except Exception as error:
        return result | {"status": "FAIL", "message": one_line(error)}
    allowed = case["tolerance"]
    close = result["value_error"] <= tolerance(allowed["value"], float32)
    if gradients is not None:
        close = close and result["gradient_error"] <= tolerance(allowed["gradient"], float32)
    return result | {"status": "pass" if close else "FAIL"}


def as_array(value, float32: bool):
    """A list as an array of float64 (or float32), int64 or bool; null in it makes it one of floats, with NaN."""
    if not isinstance(value, list):
        return value
    array = np.array(value)
    if array.dtype == object:
        array = array.astype(np.float64)
    return array.astype(np.float32) if float32 and array.dtype == np.float64 else array


def differentiable(case: dict, inputs: dict) -> list[str]:
    """The inputs by which a gradient is asked for."""
    gradient = case.get("gradient", {})
    if gradient == "finite":
        return [key for key, value in inputs.items() if isinstance(value, np.ndarray) and value.dtype.kind == "f"]
    return list(gradient)


# --- calling: each returns the outputs in the order of the file, and {input: gradient} or None for "not checked" ---


def outputs(result, names: list[str] | None) -> list:
    """One output, or those with `names` from a dict or, in this order, a tuple. Raises TypeError or KeyError."""
    if names is None:
        return [result]
    if isinstance(result, dict):
        return [result[name] for name in names]
    if not isinstance(result, tuple | list) or len(result) != len(names):
        raise TypeError(f"expected a dict or a tuple of {', '.join(names)}")
    return list(result)


def call_plainly(function, inputs, wanted, names, gradient):
    """With the gradient that is given, or none."""
    values = outputs(function(**inputs), names)
    if not gradient or not wanted:
        return values, None
    gradients = gradient(**inputs)
    return values, gradients if isinstance(gradients, dict) else {wanted[0]: gradients}


def call_torch(function, inputs, wanted, names, gradient):
    import torch

    inputs = {key: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for key, x in inputs.items()}
    if gradient or not wanted:
        return call_plainly(function, inputs, wanted, names, gradient)
    leaves = [inputs[key].requires_grad_() for key in wanted]
    values = outputs(function(**inputs), names)
    return values, dict(zip(wanted, torch.autograd.grad(values[0].sum(), leaves), strict=True))


def call_jax(function, inputs, wanted, names, gradient):
    import jax

    inputs = {key: jax.numpy.asarray(x) if isinstance(x, np.ndarray) else x for key, x in inputs.items()}
    if gradient or not wanted:
        return call_plainly(function, inputs, wanted, names, gradient)

    def total(chosen):
        values = outputs(function(**inputs | chosen), names)
        return values[0].sum(), values

    (_, values), gradients = jax.value_and_grad(total, has_aux=True)({key: inputs[key] for key in wanted})
    return values, gradients


CALLS = {"numpy": call_plainly, "torch": call_torch, "jax": call_jax}


# --- comparing ---


def tolerance(of_the_file: float, float32: bool) -> float:
    """In float32 100,000 times as much, but no more than 1e-4."""
    return max(of_the_file, min(1e5 * of_the_file, 1e-4)) if float32 else of_the_file


def gradient_error(gradients: dict, expected: dict | str) -> float:
    """The largest error over the inputs; where the file says "finite", 0 if it is, else infinity."""
    if expected == "finite":
        return 0.0 if all(np.isfinite(in_numpy(got)).all() for got in gradients.values()) else np.inf
    return max(largest_error(gradients[key], exact) for key, exact in expected.items())


def in_numpy(value) -> np.ndarray:
    """Any framework's array, number or list as float64; None ("no figure") as NaN."""
    if hasattr(value, "detach"):  # torch
        value = value.detach().cpu().double().numpy()
    return np.asarray(value, dtype=np.float64)


def largest_error(got, expected) -> float:
    """max |got - expected| / max(1, max |expected|); infinite where one of the two is NaN, "no figure", and the other
    is not. Raises ValueError for a wrong shape."""
    got, expected = in_numpy(got), in_numpy(expected)
    if got.shape != expected.shape:
        raise ValueError(f"shape {got.shape} in place of {expected.shape}")
    missing = np.isnan(expected)
    if (np.isnan(got) != missing).any():
        return np.inf
    exact = expected[~missing]
    return float(np.abs(got[~missing] - exact).max(initial=0) / max(1, np.abs(exact).max(initial=0)))


# --- the command ---


def load(target: str) -> Callable:
    """The function that "module:function" means. Raises InputError if there is none."""
    module_name, colon, function_name = target.partition(":")
    if not (module_name and colon and function_name):
        raise InputError(f"{target!r} is not of the form module:function")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever a module may do while it is read
        raise InputError(f"cannot import {module_name}: {one_line(error)}") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(f"{module_name} has no function {function_name}")
    return function


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def show(results: list[dict]) -> None:
    """One line per case, and a second one for what a failure points at."""

    def figure(error: float | None) -> str:
        return "–" if error is None else f"{error:.0e}"

    width = max(len(result["case"]) for result in results)
    for result in results:
        errors = f"value {figure(result['value_error']):>5}  gradient {figure(result['gradient_error']):>5}"
        print(f"{result['status']:8}  {result['case']:{width}}  {errors}  {result['message']}".rstrip())
        if result["status"] == "FAIL":
            print(f"{'':10}there to find: {result['catches']}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mlc_min.ports.conformance", description=__doc__, formatter_class=Help
    )
    parser.add_argument("function", nargs="?", help="module:function, from the current folder or installed")
    parser.add_argument(
        "--as", dest="name", help=f"which function it is meant to be, if not by its name: {', '.join(OWN)}"
    )
    parser.add_argument("--arrays", choices=CALLS, default="numpy", help="what it is given")
    parser.add_argument(
        "--gradient", help="module:function, same inputs -> {input: gradient}; needed with NumPy arrays"
    )
    parser.add_argument(
        "--float32", action="store_true", help="give float32 and allow 1e5 times the error, at most 1e-4"
    )
    parser.add_argument("--own", action="store_true", help="check this project's own functions in PyTorch")
    options = parser.parse_args()
    if options.own and (options.function or options.name or options.gradient):
        raise InputError("--own goes with --float32 only")
    if options.own:
        targets, options.arrays = {name: f"{module}:{name}" for name, module in OWN.items()}, "torch"
    elif not options.function:
        raise InputError("give a function as module:function, or --own")
    else:
        targets = {options.name or options.function.rpartition(":")[2]: options.function}
    gradient = load(options.gradient) if options.gradient else None
    counts = dict.fromkeys(("pass", "FAIL", "left out"), 0)
    for name, target in targets.items():
        results = check(load(target), name, options.arrays, gradient, options.float32)
        print(f"{target} as {name}, {'float32' if options.float32 else 'float64'}")
        show(results)
        if all(result["message"] for result in results):
            print("no call gave a figure: are --arrays and --as right?")
        for result in results:
            counts[result["status"]] += 1
    print(", ".join(f"{number} {status}" for status, number in counts.items()))
    if options.arrays == "numpy" and not gradient and any("gradient" in case for case in read_cases(*targets)):
        print("gradients not checked: NumPy has none, give a function with --gradient")
    sys.exit(1 if counts["FAIL"] else 0)


if __name__ == "__main__":
    run_command(main)

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

import importlib
import json
import sys
from argparse import ArgumentParser
from collections.abc import Callable

import numpy as np
import torch

from mlc_min.machinery.errors import Help, InputError, refusing, run_command
from mlc_min.machinery.files import DATA, shipped

FOLDER = DATA / "conformance"
OWN = dict.fromkeys(("mlc_loss", "cosine_loss"), "mlc_min.consistency")
OWN |= dict.fromkeys(("sequence_logps", "sft_loss", "dpo_loss", "simpo_loss", "orpo_loss"), "mlc_min.preference")
OWN |= {"safety_table": "mlc_min.evaluation.metrics"}
ARRAYS = ("numpy", "torch", "jax")


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
    if arrays not in ARRAYS:
        raise InputError(f"arrays must be one of {', '.join(ARRAYS)}, got {arrays!r}")
    with refusing(f"{arrays} is not installed", ImportError):
        framework = importlib.import_module(arrays)
    if arrays == "jax" and not float32:
        framework.config.update("jax_enable_x64", True)
    return [check_case(function, case, framework, gradient, float32) for case in cases]


def check_case(function: Callable, case: dict, framework, gradient: Callable | None, float32: bool) -> dict:
    """One entry of what `check` returns. An exception in `function` or `gradient` is a failure."""
    result = {"case": case["name"], "catches": case["catches"], "status": "left out"}
    result |= {"value_error": None, "gradient_error": None, "message": ""}
    if float32 and not case.get("float32", True):
        return result
    inputs = {key: in_file_types(value, float32) for key, value in case["inputs"].items()}
    expected, exact = case["expected"], case.get("gradient", {})
    wanted = list(exact)  # the inputs by which a gradient is asked for
    if exact == "finite":
        wanted = [key for key, value in inputs.items() if isinstance(value, np.ndarray) and value.dtype.kind == "f"]
    asarray = framework.numpy.asarray if framework.__name__ == "jax" else framework.asarray
    inputs = {key: asarray(x) if isinstance(x, np.ndarray) else x for key, x in inputs.items()}
    expected = expected if isinstance(expected, dict) else {"": expected}  # a single output has no name

    def outputs(given: dict) -> list:
        return in_order(function(**given), list(expected))

    try:
        values, gradients = call(outputs, inputs, wanted, gradient, framework)
        result["value_error"] = max(map(largest_error, values, expected.values()))
        if gradients is not None and exact == "finite":
            is_finite = all(np.isfinite(in_numpy(got)).all() for got in gradients.values())
            result["gradient_error"] = 0.0 if is_finite else np.inf
        elif gradients is not None:
            result["gradient_error"] = max(largest_error(gradients[key], value) for key, value in exact.items())
    except Exception as error:
        return result | {"status": "FAIL", "message": one_line(error)}
    limits = [(result[f"{part}_error"], tolerance(limit, float32)) for part, limit in case["tolerance"].items()]
    close = all(error is None or error <= limit for error, limit in limits)
    return result | {"status": "pass" if close else "FAIL"}


def in_file_types(value, float32: bool):
    """A list as an array of float64 (or float32), int64 or bool; null in it makes it one of floats, with NaN."""
    if not isinstance(value, list):
        return value
    array = np.array(value)
    return array.astype(np.float32 if float32 else np.float64) if array.dtype.kind in "fO" else array


def call(outputs: Callable, inputs: dict, wanted: list[str], gradient: Callable | None, framework) -> tuple:
    """The outputs, and {input: gradient of the first output's sum} for those `wanted`, or None for "not checked".
    gradient: the user's function for it; without one it is torch's or JAX's own."""
    if gradient or not wanted or framework is np:
        values, gradients = outputs(inputs), gradient(**inputs) if wanted and gradient else None
        return values, gradients if isinstance(gradients, dict | None) else {wanted[0]: gradients}
    if framework is torch:
        leaves = [inputs[key].requires_grad_() for key in wanted]
        values = outputs(inputs)
        return values, dict(zip(wanted, torch.autograd.grad(values[0].sum(), leaves), strict=True))

    def total(chosen):
        values = outputs(inputs | chosen)
        return values[0].sum(), values

    (_, values), gradients = framework.value_and_grad(total, has_aux=True)({key: inputs[key] for key in wanted})
    return values, gradients


def in_order(result, names: list[str]) -> list:
    """One output, or those with `names` from a dict or, in this order, a tuple. Raises TypeError or KeyError."""
    if names == [""]:
        return [result]
    if isinstance(result, dict):
        return [result[name] for name in names]
    if not isinstance(result, tuple | list) or len(result) != len(names):
        raise TypeError(f"expected a dict or a tuple of {', '.join(names)}")
    return list(result)


# --- comparing ---


def tolerance(of_the_file: float, float32: bool) -> float:
    """In float32 100,000 times as much, but no more than 1e-4."""
    return max(of_the_file, min(1e5 * of_the_file, 1e-4)) if float32 else of_the_file


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
    module_name, _, function_name = target.partition(":")
    if not (module_name and function_name):
        raise InputError(f"{target!r} is not of the form module:function")
    try:
        function = getattr(importlib.import_module(module_name), function_name, None)
    except (Exception, SystemExit) as error:  # whatever a module may do while it is read
        raise InputError(f"cannot import {module_name}: {one_line(error)}") from None
    if not callable(function):
        raise InputError(f"{module_name} has no function {function_name}")
    return function


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def main() -> None:
    parser = ArgumentParser(prog="python -m mlc_min.ports.conformance", description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("function", nargs="?", help="module:function, from the current folder or installed")
    add("--as", dest="name", help=f"which function it is meant to be, if not by its name: {', '.join(OWN)}")
    add("--arrays", choices=ARRAYS, default="numpy", help="what it is given")
    add("--gradient", help="module:function, same inputs -> {input: gradient}; needed with NumPy arrays")
    add("--float32", action="store_true", help="give float32 and allow 1e5 times the error, at most 1e-4")
    add("--own", action="store_true", help="check this project's own functions in PyTorch")
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
        width = max(len(result["case"]) for result in results)
        for result in results:
            errors = ["–" if e is None else f"{e:.0e}" for e in (result["value_error"], result["gradient_error"])]
            shown = f"value {errors[0]:>5}  gradient {errors[1]:>5}  {result['message']}"
            print(f"{result['status']:8}  {result['case']:{width}}  {shown}".rstrip())
            if result["status"] == "FAIL":
                print(f"{'':10}there to find: {result['catches']}")
            counts[result["status"]] += 1
        if all(result["message"] for result in results):
            print("no call gave a figure: are --arrays and --as right?")
    print(", ".join(f"{number} {status}" for status, number in counts.items()))
    if options.arrays == "numpy" and not gradient and any("gradient" in case for case in read_cases(*targets)):
        print("gradients not checked: NumPy has none, give a function with --gradient")
    sys.exit(1 if counts["FAIL"] else 0)


if __name__ == "__main__":
    run_command(main)

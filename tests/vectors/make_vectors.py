"""Makes the conformance vectors: small inputs with the outputs and gradients that a port of the losses must give.

    python -m tests.vectors.make_vectors          # writes data/conformance/*.json; a second

Inputs: cases.py. Outputs and gradients: numpy_loss.py and oracles.py, which are NumPy in float64 and share no line with
the PyTorch code. Each gradient is compared with finite differences before anything is written. The format of
the files: data/conformance/README.md.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mlc_min.machinery.errors import run_command
from mlc_min.machinery.files import write_atomically
from mlc_min.ports import numpy_loss
from mlc_min.ports.conformance import FOLDER

from . import oracles
from .cases import CASES, Case

ABOUT = {
    "mlc_loss": "Rows to length 1; singular values σ of each prompt's matrix; s = σ (paper) or σ over a constant σ₁"
    " (official): the mean over prompts of -log softmax(s / τ)₁.",
    "cosine_loss": "1 minus the mean cosine over all pairs of languages and all prompts.",
    "sequence_logps": "Sum of log p(token t | tokens before t) over the tokens of the response, and their number."
    " states: logits.",
    "sft_loss": "Minus the log-probability per token, row by row.",
    "dpo_loss": "-log sigmoid(β ((policy - reference) of the chosen - (policy - reference) of the rejected)),"
    " row by row.",
    "simpo_loss": "-log sigmoid(β (chosen - rejected) - γ), log-probabilities per token, row by row.",
    "orpo_loss": "-log p(chosen) - β log sigmoid(log odds(chosen) - log odds(rejected)), per token, odds = p / (1 - p),"
    " row by row.",
    "safety_table": "rates: percent safe in each language; avg: their mean; var: population variance of the rates as"
    " fractions, x 100; pag: mean over prompts of the share of language pairs with the same verdict."
    " null: no verdict, no figure.",
}


def oracle(name: str) -> tuple[Callable, Callable | None]:
    """The function in NumPy and its gradient, a dict by input; None for `safety_table`, which has none."""
    if name == "mlc_loss":
        return numpy_loss.mlc_loss, lambda **inputs: {"representations": numpy_loss.mlc_loss_gradient(**inputs)}
    return getattr(oracles, name), getattr(oracles, f"{name}_gradient", None)


def differentiated(name: str, inputs: dict) -> Callable[[dict], float]:
    """What the gradient is of, as a function of changed inputs: the sum over rows, of the first output."""
    if name == "mlc_loss" and inputs["form"] == "official":
        # The σ₁ that divides is a constant: the paper's form, each prompt at a temperature of its own.
        temperatures = inputs["tau"] * numpy_loss.singular_values(inputs["representations"])[:, 0]

        def official(changed):
            x = changed["representations"]
            return np.mean([numpy_loss.mlc_loss(x[n : n + 1], tau, "paper") for n, tau in enumerate(temperatures)])

        return official

    def sum_over_rows(changed):
        result = oracle(name)[0](**inputs | changed)
        return np.sum(result["sums"] if name == "sequence_logps" else result)

    return sum_over_rows


def check_gradient(name: str, case: Case, gradient: dict) -> None:
    """Compare with finite differences, one entry at a time. Raises ArithmeticError naming the case."""
    value = differentiated(name, case.inputs)
    for key, exact in gradient.items():
        x = case.inputs[key]
        # In units of a row's length, so that a long row's small gradient counts as much as a short row's large one.
        unit = np.broadcast_to(numpy_loss.row_lengths(x) if key == "representations" else 1.0, x.shape)
        error = 0.0
        for index in np.ndindex(x.shape):
            shift = np.zeros_like(x)
            shift[index] = case.step * unit[index]
            # Central differences at one step and at two: together right to the fourth power of the step.
            one, two = (value({key: x + k * shift}) - value({key: x - k * shift}) for k in (1, 2))
            numeric = (8 * one - two) / (12 * case.step)
            error = max(error, abs(numeric - exact[index] * unit[index]))
        size = np.abs(exact * unit).max()
        if not error <= 1e-5 * size + 1e-9:
            raise ArithmeticError(f"{name}, {case.name}: gradient by {key} off by {error:.1g}, at a size of {size:.1g}")


def as_json(value):
    """Arrays and NumPy numbers as lists and numbers; -0.0 as 0.0."""
    if isinstance(value, dict):
        return {name: as_json(item) for name, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list):
        return [as_json(item) for item in value]
    return value + 0.0 if isinstance(value, float) else value


def case_as_json(name: str, case: Case) -> dict:
    """The case as it stands in the file, its gradient checked."""
    function, gradient_of = oracle(name)
    result = {"name": case.name, "catches": case.catches}
    if case.note:
        result["note"] = case.note
    if not case.float32:
        result["float32"] = False
    result |= {"inputs": as_json(case.inputs), "expected": as_json(function(**case.inputs))}
    tolerance = {"value": case.tolerance[0]}
    if gradient_of:
        tolerance["gradient"] = case.tolerance[1]
        result["gradient"] = "finite"
        if case.unique:
            gradient = gradient_of(**case.inputs)
            check_gradient(name, case, gradient)
            result["gradient"] = as_json(gradient)
    return result | {"tolerance": tolerance}


def as_text(value, indent: str = "") -> str:
    """JSON in which a list of numbers takes one line, so that a matrix looks like one. Raises ValueError at NaN."""
    inside = indent + " "
    if isinstance(value, dict):
        lines = [f"{inside}{json.dumps(name)}: {as_text(item, inside)}" for name, item in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, list | dict) for item in value):
        return "[\n" + ",\n".join(inside + as_text(item, inside) for item in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def make_all(folder: Path) -> None:
    """Write one file per function, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, cases in CASES.items():
        value = {"function": name, "about": ABOUT[name], "cases": [case_as_json(name, case) for case in cases()]}
        write_atomically(folder / f"{name}.json", as_text(value) + "\n")
        print(f"{folder / name}.json: {len(value['cases'])} cases")


def main() -> None:
    make_all(FOLDER)


if __name__ == "__main__":
    run_command(main)

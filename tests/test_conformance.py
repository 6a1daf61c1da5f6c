"""The conformance vectors: PyTorch, NumPy and JAX agree on them, and every case fails for the mistake that it names."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid, pad
from vectors import make_vectors, oracles
from vectors.cases import CASES

from mlc_min.consistency import cosine_loss, mlc_floor, mlc_loss, singular_values, unit_rows
from mlc_min.evaluation.metrics import safety_table
from mlc_min.machinery.errors import InputError, run_command
from mlc_min.ports import conformance, numpy_loss
from mlc_min.ports.conformance import FOLDER, OWN, check, largest_error, load
from mlc_min.preference import dpo_loss, orpo_loss, simpo_loss

ROOT = Path(__file__).resolve().parent.parent
both_precisions = pytest.mark.parametrize("float32", [False, True])


def read(name: str, folder: Path = FOLDER) -> dict:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def failures(results: list[dict]) -> dict[str, dict]:
    return {result["case"]: result for result in results if result["status"] == "FAIL"}


# --- what passes ---


@both_precisions
@pytest.mark.parametrize("name", OWN)
def test_our_own_functions_pass_every_case(name, float32):
    results = check(load(f"{OWN[name]}:{name}"), name, "torch", float32=float32)
    assert not failures(results)
    assert len(results) == len(read(name)["cases"])
    checked = [result for result in results if result["status"] == "pass"]
    assert len(checked) >= len(results) - 1  # one case is not for float32
    assert all((result["gradient_error"] is None) == (name == "safety_table") for result in checked)


@both_precisions
def test_the_numpy_loss_passes_with_its_gradient(float32):
    results = check(numpy_loss.mlc_loss, "mlc_loss", "numpy", numpy_loss.mlc_loss_gradient, float32)
    assert not failures(results)
    assert all(result["gradient_error"] is not None for result in results if result["status"] == "pass")


@pytest.mark.parametrize(("float32", "compiled"), [(False, False), (True, True)])
def test_the_jax_loss_passes_with_its_gradient(float32, compiled):
    jax = pytest.importorskip("jax")
    from mlc_min.ports import jax_loss

    function = jax.jit(jax_loss.mlc_loss, static_argnames="form") if compiled else jax_loss.mlc_loss
    results = check(function, "mlc_loss", "jax", float32=float32)
    assert not failures(results)
    assert all(result["gradient_error"] is not None for result in results if result["status"] == "pass")


# --- the files ---


def test_the_committed_files_are_what_make_vectors_writes(tmp_path):
    make_vectors.make_all(tmp_path)
    assert (
        {path.name for path in tmp_path.iterdir()}
        == {f"{name}.json" for name in OWN}
        == {path.name for path in FOLDER.glob("*.json")}
    )
    for name in OWN:
        committed, made = read(name), read(name, tmp_path)
        for old, new in zip(committed["cases"], made["cases"], strict=True):
            for part, limit in (("expected", "value"), ("gradient", "gradient")):
                before, after = (numbers(case.pop(part, None)) for case in (old, new))
                for key in before | after:
                    # Exact but for the rounding of another machine's linear algebra.
                    assert largest_error(after[key], before[key]) <= 0.1 * old["tolerance"][limit], old["name"]
        assert made == committed


def numbers(value) -> dict:
    """An expected value or gradient as arrays by name."""
    if isinstance(value, dict):
        return value
    return {} if value in (None, "finite") else {"": value}


@pytest.mark.parametrize("form", ["official", "paper"])
def test_figures_that_follow_from_theory(form):
    expected = {case["name"]: case["expected"] for case in read("mlc_loss")["cases"]}
    assert expected[f"collinear rows, {form}"] == pytest.approx(mlc_floor(4, 3, 0.2, form), rel=1e-12)
    assert expected[f"antipodal rows, {form}"] == pytest.approx(mlc_floor(4, 3, 0.2, form), rel=1e-12)
    assert expected[f"orthogonal rows, {form}"] == pytest.approx(np.log(3), rel=1e-12)
    assert expected["very long rows"] == pytest.approx(expected["very short rows"], rel=1e-12)
    dpo = {case["name"]: case["expected"] for case in read("dpo_loss")["cases"]}
    assert dpo["policy equal to the reference"] == pytest.approx([np.log(2)] * 4, rel=1e-12)
    assert dpo["a constant added to both responses"] == pytest.approx(dpo["generic"], rel=1e-12)


def test_the_expected_figures_come_from_no_line_of_the_code_that_they_check():
    allowed = {"errors", "files", "ports", "conformance", "numpy_loss"}
    for path in [*Path(make_vectors.__file__).parent.glob("*.py"), Path(numpy_loss.__file__)]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(module.startswith("torch") for module in modules)
            assert all(module.split(".")[-1] in allowed for module in modules if module.startswith("mlc_min"))


def test_a_wrong_gradient_stops_the_making(monkeypatch):
    monkeypatch.setattr(oracles, "dpo_loss_gradient", lambda beta, **logps: {"policy_chosen_logps": np.full(4, -0.1)})
    case = next(case for case in CASES["dpo_loss"]() if case.name == "generic")
    with pytest.raises(ArithmeticError, match=r"dpo_loss, generic: gradient by policy_chosen_logps"):
        make_vectors.case_as_json("dpo_loss", case)


def test_where_the_gradient_is_not_unique_the_file_asks_for_a_finite_one_only():
    for name in OWN:
        for case in read(name)["cases"]:
            if name == "mlc_loss":
                sigma = singular_values(torch.tensor(case["inputs"]["representations"], dtype=torch.float64))
                kink = sigma.shape[1] > 1 and (sigma[:, 0] - sigma[:, 1] < 1e-9) | (sigma[:, -1] < 1e-9)
                assert (case["gradient"] == "finite") == bool(torch.as_tensor(kink).any()), case["name"]
            else:
                assert case.get("gradient") != "finite"


def test_a_nan_is_never_written():
    with pytest.raises(ValueError):
        make_vectors.as_text({"expected": [1.0, float("nan")]})


# --- what fails: for every case a function with the mistake that the case names ---


def mlc_of(sigma, tau, form, stop=True):
    first = sigma[:, :1].detach() if stop else sigma[:, :1]
    return -torch.log_softmax((sigma / first if form == "official" else sigma) / tau, -1)[:, 0].mean()


def through_gram(x, tau, form):
    z = unit_rows(x)
    values = torch.linalg.eigvalsh(z @ z.mT).flip(-1)[:, : min(z.shape[1:])]
    return mlc_of(values.clamp(min=0).sqrt(), tau, form)


def through_vectors(x, tau, form):
    z = unit_rows(x)
    u, _, vt = torch.linalg.svd(z, full_matrices=False)
    return mlc_of((u.mT @ z @ vt.mT).diagonal(dim1=1, dim2=2), tau, form)


def softmax_written_out(x, tau, form):
    sigma = singular_values(x)
    odds = ((sigma / sigma[:, :1].detach() if form == "official" else sigma) / tau).exp()
    return -(odds[:, 0] / odds.sum(-1)).log().mean()


def svd_of(rows):
    return lambda x, tau, form: mlc_of(torch.linalg.svdvals(rows(x)), tau, form)


def without_zeros(x, tau, form):
    sigma = singular_values(x)
    return mlc_of(sigma.where(sigma > 1e-6, -torch.inf), tau, form)


def padded(axis):
    return lambda x, tau, form: mlc_of(pad(s := singular_values(x), (0, x.shape[axis] - s.shape[1])), tau, form)


def different(rows):
    """The indices of the first of every kind of row."""
    return np.unique(rows.detach().numpy(), axis=0, return_index=True)[1]


def plain_length(x):
    return x / x.square().sum(-1, keepdim=True).sqrt()


def with_epsilon(x):
    return x / (x.norm(dim=-1, keepdim=True) + 1e-12)


def in_both_forms(*names):
    return [f"{name}, {form}" for name in names for form in ("official", "paper")]


MLC = [
    (lambda x, tau, form: mlc_of(singular_values(x) ** 2, tau, form), ["two languages, by hand"]),
    (lambda x, tau, form: mlc_loss(x, tau, "paper"), ["official form"]),
    (lambda x, tau, form: mlc_loss(x, tau, "official"), ["paper form"]),
    (lambda x, tau, form: mlc_of(singular_values(x), tau, form, stop=False), ["stop-gradient"]),
    (lambda x, tau, form: mlc_loss(x, tau, form) * len(x), in_both_forms("three prompts")),
    (
        lambda x, tau, form: mlc_of((s := singular_values(x)) / s[0, 0].detach(), tau, "paper"),
        ["prompts of different spread"],
    ),
    (lambda x, tau, form: mlc_loss(x.transpose(0, 1), tau, form), ["as many prompts as languages"]),
    (lambda x, tau, form: mlc_loss(x, 0.2, form), ["tau 0.05", "tau 0.5, paper"]),
    (lambda x, tau, form: mlc_loss(x, 1 / tau, form), ["tau 0.05", "tau 0.5, paper"]),
    (softmax_written_out, ["tau 0.001"]),
    (svd_of(lambda x: x), ["rows of different lengths"]),
    (svd_of(lambda x: x / x.norm(dim=(1, 2), keepdim=True)), ["long and short rows"]),
    (without_zeros, in_both_forms("collinear rows")),
    (lambda x, tau, form: cosine_loss(x), in_both_forms("antipodal rows")),
    (lambda x, tau, form: mlc_of(singular_values(x)[:, :-1], tau, form), in_both_forms("orthogonal rows")),
    (padded(1), [*in_both_forms("more languages than dimensions"), "one dimension"]),
    (padded(2), [*in_both_forms("one language"), "fewer languages than dimensions"]),
    (through_gram, ["a repeated row", "identical rows", "rows 0.001 % apart"]),
    (lambda x, tau, form: mlc_loss(x[:, different(x[0])], tau, form), ["repeated rows in the plane"]),
    (through_vectors, ["two equal lesser singular values"]),
    (svd_of(with_epsilon), ["very short rows"]),
]
MLC_FLOAT32 = [(through_gram, ["rows 1 % apart"]), (svd_of(plain_length), ["very long rows", "very short rows"])]


def cosines(x, rows=unit_rows):
    """The cosines of all ordered pairs of rows, those of a row with itself included: (N, m, m)."""
    return (z := rows(x)) @ z.mT


def pairs(matrix):
    """Those of two different rows, each once: (N, m, m) -> (N, m (m - 1) / 2)."""
    first, second = np.triu_indices(matrix.shape[-1], 1)
    return matrix[:, first, second]


COSINE = [
    (lambda x: 1 - cosine_loss(x), ["two languages, by hand"]),
    (lambda x: 1 - cosines(x).mean(), ["generic"]),
    (lambda x: cosine_loss(x) * len(x), ["three prompts"]),
    (lambda x: cosine_loss(x.transpose(0, 1)), ["as many prompts as languages"]),
    (lambda x: 1 - pairs(cosines(x, lambda x: x)).mean(), ["rows of different lengths"]),
    (lambda x: 1 - pairs(cosines(x)).abs().mean(), ["antipodal rows"]),
    (lambda x: 1 - pairs(cosines(x)).sum(-1).mean(), ["identical rows"]),
    (lambda x: 1 - pairs(cosines(x)).mean(), ["one language"]),
]
COSINE_FLOAT32 = [(lambda x: 1 - pairs(cosines(x, plain_length)).mean(), ["very long rows"])]


def logps_with(mask_of=lambda ids, mask: mask, shift=1, log_softmax=lambda x: x.log_softmax(-1), mean=False):
    def wrong(states, ids, mask):
        mask = mask_of(ids, mask)[:, shift:]
        logps = log_softmax(states[:, : states.shape[1] - shift]).gather(-1, ids[:, shift:, None])[..., 0]
        sums = logps.where(mask, 0).sum(-1)
        return sums / mask.sum(-1) if mean else sums, mask.sum(-1)

    return wrong


def up_to_the_end(ids, mask):
    return (mask.long().flip(-1).cumsum(-1).flip(-1) > 0) & (torch.arange(ids.shape[1]) > 0)


def from_the_start(ids, mask):
    return mask.long().cumsum(-1) > 0


LOGPS = [
    (logps_with(up_to_the_end), ["all tokens equally likely, by hand", "a prompt that the model finds unlikely"]),
    (logps_with(shift=0), ["a model that predicts perfectly"]),
    (logps_with(mean=True), ["responses of different lengths"]),
    (logps_with(from_the_start), ["padding on the right"]),
    (logps_with(lambda ids, mask: mask & (ids != 2)), ["padding token equal to the end token"]),
    (logps_with(lambda ids, mask: mask | (ids == 2)), ["padding token equal to the end token"]),
    (lambda states, ids, mask: logps_with()(states, ids[:, :-1], mask[:, :-1]), ["a response of one token, the last"]),
    (logps_with(log_softmax=lambda x: (x.exp() / x.exp().sum(-1, keepdim=True)).log()), ["logits of 1000"]),
    (logps_with(lambda ids, mask: up_to_the_end(ids, mask) & from_the_start(ids, mask)), ["a mask with a gap"]),
]

SFT = [
    (lambda logps, lengths: -logps, ["generic"]),
    (lambda logps, lengths: (-logps.sum() / lengths.sum()).expand(len(logps)), ["3 and 30 tokens"]),
    (lambda logps, lengths: -logps / (lengths - 1), ["one token"]),
]

DPO = [
    (lambda c, r, rc, rr, beta: dpo_loss(c, r, 0 * rc, 0 * rr, beta), ["policy equal to the reference"]),
    (lambda c, r, rc, rr, beta: dpo_loss(c, r, rc, 0 * rr, beta), ["policy equal to the reference"]),
    (lambda c, r, rc, rr, beta: dpo_loss(r, c, rr, rc, beta), ["generic"]),
    (lambda c, r, rc, rr, beta: dpo_loss(c, r, -rc, -rr, beta), ["a policy without a preference"]),
    (lambda c, r, rc, rr, beta: dpo_loss(c, r, rc, rr, 0.1), ["beta 0.5"]),
    (lambda c, r, rc, rr, beta: -torch.sigmoid(beta * (c - rc - r + rr)).log(), ["margins of 1000 and 10000"]),
    (lambda c, r, rc, rr, beta: (1 + torch.exp(-beta * (c - rc - r + rr))).log(), ["margins of 1000 and 10000"]),
    (
        lambda c, r, rc, rr, beta: dpo_loss(c.exp(), r.exp(), rc.exp(), rr.exp(), beta),
        ["a constant added to both responses"],
    ),
    (lambda c, r, rc, rr, beta: dpo_loss(c, r, rc, rr, beta) - 0.01 * c, ["a constant added to both responses"]),
]

SIMPO = [
    (lambda c, r, lc, lr, beta, gamma: simpo_loss(r, c, lr, lc, beta, gamma), ["generic"]),
    (lambda c, r, lc, lr, beta, gamma: simpo_loss(c, r, 1, 1, beta, gamma), ["3 and 30 tokens"]),
    (lambda c, r, lc, lr, beta, gamma: simpo_loss(c, r, lc, lr, beta, 1.0), ["gamma 0"]),
    (lambda c, r, lc, lr, beta, gamma: simpo_loss(c, r, lc, lr, beta, beta * gamma), ["beta 10, gamma 3"]),
    (lambda c, r, lc, lr, beta, gamma: (1 + torch.exp(gamma - beta * (c / lc - r / lr))).log(), ["margins of 1000"]),
]


def orpo_with(log_one_minus_exp):
    def wrong(c, r, lc, lr, beta):
        x, y = c / lc, r / lr
        return -x - beta * logsigmoid(x - y - log_one_minus_exp(x) + log_one_minus_exp(y))

    return wrong


def written_out(x):
    return torch.log(1 - torch.exp(x.clamp(max=-1e-6)))


ORPO = [
    (orpo_with(torch.zeros_like), ["one half and one quarter, by hand"]),
    (lambda c, r, lc, lr, beta: orpo_loss(r, c, lr, lc, beta), ["generic"]),
    (lambda c, r, lc, lr, beta: orpo_loss(c, r, lc, lr, 0.1), ["beta 1"]),
    (lambda c, r, lc, lr, beta: orpo_loss(c, r, 1, 1, beta), ["3 and 30 tokens"]),
    (orpo_with(lambda x: torch.log(-torch.expm1(x))), ["certain responses, -1e-08", "certain responses, 0"]),
]
ORPO_FLOAT32 = [(orpo_with(written_out), ["nearly certain responses"])]


def table_with(change, before=lambda safe: safe):
    return lambda safe: change(before(safe), safety_table(before(safe)))


def sample_variance(safe, table):
    return table | {"var": np.var(table["rates"], ddof=1) / 100}


def all_agree(safe, table):
    return table | {"pag": np.mean([len(set(row)) == 1 for row in safe.tolist()])}


def zero_as_none(safe, table):
    return {name: value or None for name, value in table.items()}


def both_safe(safe, table):
    rows = safe.double()
    return table | {"pag": pairs(rows[:, :, None] * rows[:, None]).mean()}


def pooled_pairs(safe, table):
    same = pairs((safe[:, :, None] == safe[:, None]).double())
    there = pairs((safe[:, :, None] + safe[:, None]).isfinite())
    return table | {"pag": same[there].mean()}


def others_only(safe, table):
    return table | {"avg": np.mean([rate for rate in table["rates"] if rate is not None])}


SAFETY = [
    (table_with(sample_variance), ["by hand"]),
    (table_with(all_agree), ["four languages"]),
    (table_with(zero_as_none), ["all safe"]),
    (table_with(both_safe), ["none safe"]),
    (
        table_with(lambda safe, table: table, lambda safe: safe == 1),
        ["missing verdicts", "a language without a verdict"],
    ),
    (table_with(pooled_pairs), ["prompts with few verdicts"]),
    (table_with(others_only), ["a language without a verdict"]),
    (table_with(lambda safe, table: table | {"pag": table["pag"] or 1.0}), ["one language"]),
]

MISTAKES = [
    (name, wrong, case, float32)
    for name, in_float64, in_float32 in (
        ("mlc_loss", MLC, MLC_FLOAT32),
        ("cosine_loss", COSINE, COSINE_FLOAT32),
        ("sequence_logps", LOGPS, []),
        ("sft_loss", SFT, []),
        ("dpo_loss", DPO, []),
        ("simpo_loss", SIMPO, []),
        ("orpo_loss", ORPO, ORPO_FLOAT32),
        ("safety_table", SAFETY, []),
    )
    for mistakes, float32 in ((in_float64, False), (in_float32, True))
    for wrong, names in mistakes
    for case in names
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("name", "wrong", "case", "float32"), MISTAKES, ids=lambda x: x if isinstance(x, str) else "")
def test_a_case_fails_for_the_mistake_that_it_names(name, wrong, case, float32):
    failed = failures(check(lambda **inputs: wrong(*inputs.values()), name, "torch", float32=float32))
    assert case in failed
    assert not failed[case]["message"]  # wrong, and not merely broken


def test_every_case_has_its_mistake():
    for name in OWN:
        assert {case["name"] for case in read(name)["cases"]} == {case for n, _, case, _ in MISTAKES if n == name}


# --- the checker ---


def test_a_wrong_shape_a_wrong_structure_and_an_exception_are_failures_that_say_so():
    def refuses(**inputs):
        raise TypeError("not like\nthis")

    for function, name, message in (
        (lambda representations, **_: representations, "mlc_loss", "ValueError: shape (1, 2, 2) in place of ()"),
        (
            lambda states, **_: states.sum((1, 2)),
            "sequence_logps",
            "TypeError: expected a dict or a tuple of sums, lengths",
        ),
        (lambda safe: {"rates": [100.0, 50.0]}, "safety_table", "KeyError: 'avg'"),
        (refuses, "dpo_loss", "TypeError: not like this"),
    ):
        results = check(function, name, "numpy")
        assert results[0]["message"] == message
        assert all(result["status"] == "FAIL" for result in results)


def test_a_value_without_a_gradient_is_a_failure_in_torch_and_not_checked_in_numpy():
    in_torch = check(lambda **inputs: mlc_loss(**inputs).detach(), "mlc_loss", "torch")
    assert all("does not require grad" in result["message"] for result in in_torch)
    in_numpy = check(numpy_loss.mlc_loss, "mlc_loss")
    assert not failures(in_numpy) and {result["gradient_error"] for result in in_numpy} == {None}


@pytest.mark.parametrize(
    ("got", "expected", "error"),
    [
        (3.0, 2.0, 0.5),  # of the larger than 1
        ([0.5, 0.0], [0.25, 0.0], 0.25),
        ([None, 1.0], [None, 1.0], 0.0),
        ([float("nan"), 1.0], [None, 1.0], 0.0),
        ([None, 1.0], [0.0, 1.0], np.inf),
        ([0.0, 1.0], [None, 1.0], np.inf),
        (float("inf"), 1.0, np.inf),
        (None, None, 0.0),
        ([], [], 0.0),
    ],
)
def test_the_largest_error(got, expected, error):
    assert largest_error(got, expected) == error


@pytest.mark.parametrize(
    ("of_the_file", "in_float32"), [(1e-9, 1e-4), (1e-11, 1e-6), (1e-29, 1e-24), (1e-6, 1e-4), (1e-3, 1e-3)]
)
def test_float32_is_allowed_more(of_the_file, in_float32):
    assert conformance.tolerance(of_the_file, False) == of_the_file
    assert conformance.tolerance(of_the_file, True) == pytest.approx(in_float32)


@both_precisions
def test_inputs_come_as_the_readme_says(float32):
    seen = {}

    def look(**inputs):
        seen.update({name: getattr(x, "dtype", type(x)) for name, x in inputs.items()})

    for name in OWN:
        check(look, name, "torch", float32=float32)
    floats = torch.float32 if float32 else torch.float64
    assert {seen.pop(name) for name in ("tau", "beta", "gamma")} == {float}
    assert seen.pop("form") is str
    assert {name: dtype for name, dtype in seen.items() if dtype != floats} == {
        "input_ids": torch.int64,
        "response_mask": torch.bool,
        "chosen_lengths": torch.int64,
        "rejected_lengths": torch.int64,
        "safe": torch.bool,
    }


PORTS = """
from mlc_min.ports.numpy_loss import mlc_loss, mlc_loss_gradient
from vectors.oracles import dpo_loss, dpo_loss_gradient
cosine_of_rows = lambda representations, **_: 1.0
dictionary = lambda **inputs: {"representations": mlc_loss_gradient(**inputs)}
number = 3
"""


def run(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    """The exit code of the command and what it printed, on stderr if it is 2."""
    monkeypatch.setattr(sys, "argv", ["conformance", *arguments])
    with pytest.raises(SystemExit) as exit_:
        run_command(conformance.main)
    out, err = capsys.readouterr()
    return exit_.value.code, err if exit_.value.code == 2 else out


@pytest.fixture
def ports(tmp_path, monkeypatch):
    (tmp_path / "my_ports.py").write_text(PORTS)
    (tmp_path / "my_broken.py").write_text("1 / 0")
    (tmp_path / "my_script.py").write_text("import sys\nsys.exit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_ports", None)


@pytest.mark.parametrize(
    ("arguments", "last"),
    [
        (["my_ports:mlc_loss"], "gradients not checked: NumPy has none, give a function with --gradient"),
        (["my_ports:mlc_loss", "--gradient", "my_ports:mlc_loss_gradient"], "33 pass, 0 FAIL, 0 left out"),
        (["my_ports:mlc_loss", "--gradient", "my_ports:dictionary", "--float32"], "32 pass, 0 FAIL, 1 left out"),
        (["my_ports:dpo_loss", "--gradient", "my_ports:dpo_loss_gradient"], "6 pass, 0 FAIL, 0 left out"),
        (["mlc_min.evaluation.metrics:safety_table"], "8 pass, 0 FAIL, 0 left out"),
        (["mlc_min.consistency:cosine_loss", "--arrays", "torch"], "9 pass, 0 FAIL, 0 left out"),
        (["--own"], "80 pass, 0 FAIL, 0 left out"),
        (["--own", "--float32"], "79 pass, 0 FAIL, 1 left out"),
    ],
)
def test_exit_code_0_when_all_pass(ports, monkeypatch, capsys, arguments, last):
    code, out = run(monkeypatch, capsys, *arguments)
    assert code == 0 and out.splitlines()[-1] == last


def test_exit_code_1_when_one_fails_and_the_failure_says_what_it_finds(ports, monkeypatch, capsys):
    code, out = run(monkeypatch, capsys, "my_ports:cosine_of_rows", "--as", "cosine_loss")
    assert code == 1
    line = next(number for number, text in enumerate(out.splitlines()) if " antipodal rows " in text)
    assert out.splitlines()[line].startswith("FAIL ") and " value 5e-01 " in out.splitlines()[line]
    assert (
        out.splitlines()[line + 1].strip().startswith("there to find: the absolute value or the square of the cosine")
    )
    assert "FAIL, 0 left out" in out and "no call gave a figure" not in out


def test_torch_code_given_numpy_arrays_is_told_so(monkeypatch, capsys):
    code, out = run(monkeypatch, capsys, "mlc_min.consistency:mlc_loss")
    assert code == 1 and "no call gave a figure: are --arrays and --as right?" in out.splitlines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a function as module:function, or --own"),
        (["--as", "mlc_loss"], "give a function as module:function, or --own"),
        (["--own", "my_ports:mlc_loss"], "--own goes with --float32 only"),
        (["mlc_loss"], "'mlc_loss' is not of the form module:function"),
        (["nowhere:mlc_loss"], "cannot import nowhere: ModuleNotFoundError: "),
        (["my_broken:mlc_loss"], "cannot import my_broken: ZeroDivisionError: division by zero"),
        (["my_script:mlc_loss"], "cannot import my_script: SystemExit: 3"),
        (["my_ports:number", "--as", "mlc_loss"], "my_ports has no function number"),
        (["my_ports:nothing", "--as", "mlc_loss"], "my_ports has no function nothing"),
        (["my_ports:mlc_loss", "--gradient", "my_ports:nothing"], "my_ports has no function nothing"),
        (["my_ports:dictionary"], f"no cases for 'dictionary': say with --as which of these it is: {', '.join(OWN)}"),
    ],
)
def test_exit_code_2_and_one_line_for_what_cannot_be_checked(ports, monkeypatch, capsys, arguments, message):
    code, out = run(monkeypatch, capsys, *arguments)
    assert code == 2 and out.count("\n") == 1
    assert out.startswith(f"error: {message}") if message.endswith(": ") else out == f"error: {message}\n"


def test_a_framework_that_is_missing_or_unknown_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)  # as if not installed
    with pytest.raises(InputError, match="jax is not installed"):
        check(numpy_loss.mlc_loss, "mlc_loss", "jax")
    with pytest.raises(InputError, match="arrays must be one of numpy, torch, jax, got 'mlx'"):
        check(numpy_loss.mlc_loss, "mlc_loss", "mlx")


def test_as_a_command_it_finds_modules_in_the_current_folder(tmp_path):
    (tmp_path / "my_ports.py").write_text(PORTS)
    root = Path(conformance.__file__).parents[2]
    command = [sys.executable, "-m", "mlc_min.ports.conformance", "my_ports:mlc_loss"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "33 pass, 0 FAIL, 0 left out" in done.stdout


# --- what is said about them ---


def test_the_porting_guide_and_the_readme_name_cases_that_exist():
    guide = (ROOT / "tutorials" / "07-your-own.md").read_text(encoding="utf-8").split("### Ten things")[1]
    rows = [line for line in guide.splitlines() if line.startswith("| ") and "conformance case" not in line]
    assert len(rows) == 10
    for row in rows:
        for part in row.split(" | ")[1].split(";"):
            file, *names = re.findall(r"`(\w+)`|\"([^\"]+)\"", part)
            known = {case["name"] for case in read(file[0])["cases"]}
            assert names and {name for _, name in names} <= known, row
    total = sum(len(read(name)["cases"]) for name in OWN)
    assert f"{total} framework-free cases" in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    page = (ROOT / "mlc_min/ports/README.md").read_text(encoding="utf-8")
    assert f"[{total} cases](../../data/conformance/README.md)" in page

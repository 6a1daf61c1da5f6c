"""What a newcomer's machine may lack: packages, and the modules of Python that only Unix has."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest's own need on Python 3.10

ROOT = Path(__file__).resolve().parent.parent


def python(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "mlc_min"),
        ("-m", "mlc_min.train", "--help"),
        ("-m", "mlc_min.safety", "--help"),
        ("-m", "mlc_min.ports.trl", "--help"),
        ("tutorials/run.py",),
    ],
)
def test_without_pytorch_a_command_says_in_one_line_what_to_install(command):
    process = python("-S", *command)  # -S: Python without any installed package
    assert process.returncode == 2
    assert process.stderr == "error: PyTorch is not installed; run `pip install -r requirements.txt`\n"


@pytest.mark.parametrize("name", ["transformers", "matplotlib", "py3langid"])
def test_the_import_without_a_package_names_it(name):
    process = python("-c", f"import sys; sys.modules[{name!r}] = None; import mlc_min")
    last = process.stderr.strip().split("\n")[-1]
    assert last == f"ImportError: {name} is not installed; run `pip install -r requirements.txt`"


IMPORT_ALL = """
import builtins, importlib, pkgutil
import mlc_min

real, left_out = builtins.__import__, ("mlc_min.ports.jax_loss",)  # jax is not among the requirements

def without_unix(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "")
    if importer.startswith("mlc_min") and name in ("resource", "fcntl", "termios", "pwd", "grp", "readline"):
        raise ImportError(f"{importer} imports {name}, which Windows does not have")
    return real(name, globals, locals, fromlist, level)

builtins.__import__ = without_unix
for module in pkgutil.walk_packages(mlc_min.__path__, "mlc_min."):
    if module.name not in left_out:
        importlib.import_module(module.name)
        print(module.name)
"""


def test_every_module_imports_without_what_only_unix_has():
    process = python("-c", IMPORT_ALL)
    assert process.returncode == 0, process.stderr.strip().split("\n")[-1]
    assert {"mlc_min.train", "mlc_min.safety", "mlc_min.__main__"} <= set(process.stdout.split())


@pytest.mark.slow
@pytest.mark.parametrize("command", ["mlc_min", "mlc_min.train", "mlc_min.lab.ablations"])
def test_a_package_without_the_repositorys_data_says_so_in_one_line(tmp_path, command):
    shutil.copytree(ROOT / "mlc_min", tmp_path / "mlc_min", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", *command.split()]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert "installed without the repository's data; clone it and run `pip install -e .`" in process.stderr


def requirements(lines: list[str]) -> dict[str, Requirement]:
    wishes = [Requirement(line.partition("#")[0]) for line in lines if line.partition("#")[0].strip()]
    return {wish.name: wish for wish in wishes}


def test_every_exact_version_lies_in_the_range_of_the_package_and_every_dependency_has_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    ranges = requirements([*project["dependencies"], *project["optional-dependencies"]["test"]])
    pinned = requirements((ROOT / "requirements.txt").read_text("utf-8").splitlines())
    for name, wish in pinned.items():
        (version,) = wish.specifier
        assert version.operator == "==", f"{wish}: not exact"
        assert name not in ranges or ranges[name].specifier.contains(version.version), f"{wish}: not {ranges[name]}"
    assert set(ranges) <= set(pinned)


# Imported where they are used, with a line that says what to install.
OPTIONAL = {"peft", "trl", "datasets", "jax", "gguf"}
NAMES = {"yaml": "pyyaml", "huggingface_hub": "huggingface-hub"}  # a module's name, and its package's if it is another


def test_every_package_that_is_imported_is_declared():
    declared = set(requirements((ROOT / "requirements.txt").read_text("utf-8").splitlines())) | OPTIONAL | {"mlc_min"}
    for path in (ROOT / "mlc_min").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names:
                assert NAMES.get(name, name) in declared, f"{path.relative_to(ROOT)} imports {name}"

"""The shape of the repository: who may import whom, how long the method is, and a README that names what is there."""

import ast
import inspect
import re
from pathlib import Path

import mlc_min
from mlc_min import consistency, examples, loop, preference, states

ROOT = Path(__file__).resolve().parent.parent
METHOD = ("consistency", "preference", "states", "examples", "loop")
# Of each room: the rooms whose modules it may import, itself included. What is not listed is not allowed.
ROOMS = {
    "method": {"method"},
    "machinery": {"method", "machinery"},
    "evaluation": {"method", "machinery", "evaluation"},
    "train": {"method", "machinery", "evaluation"},
    "safety": {"method", "machinery", "evaluation"},
    "ports": {"method", "machinery", "evaluation", "train", "ports"},
    "lab": {"method", "machinery", "evaluation", "train", "safety", "ports", "lab"},
    "__main__": {"method", "machinery", "evaluation", "train", "safety", "lab"},
    "__init__": {"method", "machinery"},
}
OUTSIDE = {
    "consistency": {"math", "torch"},
    "preference": {"collections", "torch"},
    "states": {"numpy", "torch", "transformers"},
    "examples": {"contextlib", "dataclasses", "torch", "transformers"},
    "loop": {"collections", "contextlib", "dataclasses", "functools", "itertools", "torch", "transformers"},
}


def modules() -> dict[str, Path]:
    """{"consistency" or "lab.published.rows": its file}."""
    package = ROOT / "mlc_min"
    return {".".join(path.relative_to(package).with_suffix("").parts): path for path in package.rglob("*.py")}


def imported(path: Path) -> list[str]:
    """The names of all modules that a file imports, also within functions; of `from a import b` both a and a.b."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


def room(module: str) -> str:
    first = module.split(".")[0]
    return "method" if module in METHOD else first


def ours(path: Path) -> set[str]:
    """Those of our modules that a file imports."""
    known = modules()
    names = {name.removeprefix("mlc_min.") for name in imported(path) if name.startswith("mlc_min.")}
    return {name for name in names if name in known}


def test_every_room_imports_from_the_rooms_that_it_may_and_no_others():
    for name, path in modules().items():
        for other in ours(path):
            assert room(other) in ROOMS[room(name)], f"{name} imports {other}"


def test_the_method_imports_nothing_but_itself_and_a_handful_of_packages():
    for name in METHOD:
        path = modules()[name]
        outside = {other.split(".")[0] for other in imported(path) if not other.startswith("mlc_min")}
        assert outside <= OUTSIDE[name], name
    from_transformers = {name for name in imported(modules()["loop"]) if name.startswith("transformers.")}
    assert from_transformers == {"transformers.PreTrainedModel", "transformers.get_cosine_schedule_with_warmup"}


def test_imports_make_no_circle():
    waiting = {name: ours(path) - {name} for name, path in modules().items() if name != "__init__"}
    while waiting:
        free = {name for name, needs in waiting.items() if not needs & set(waiting)}
        assert free, f"a circle among {sorted(waiting)}"
        waiting = {name: needs for name, needs in waiting.items() if name not in free}


def test_the_method_is_read_in_an_hour_and_the_package_grows_no_further():
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules().items()}
    assert sum(lengths[name] for name in METHOD) <= 650
    assert sum(lengths.values()) <= 7_000  # the aim is 5,000


def test_no_function_of_the_method_takes_more_than_five_arguments_but_the_losses_of_two_models():
    pairs = {"simpo_loss"}  # chosen and rejected, log-probs and lengths, and two constants
    for module in (consistency, preference, states, examples, loop):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and name not in pairs:
                assert len(inspect.signature(function).parameters) <= 5, name


def test_the_method_prints_nothing_and_opens_nothing():
    for name in METHOD:
        calls = {node.func.id for node in ast.walk(ast.parse(modules()[name].read_text(encoding="utf-8")))
                 if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}  # fmt: skip
        assert not calls & {"print", "open", "Path", "input"}, name


def test_the_readme_names_every_file_of_the_method_every_folder_and_every_link_leads_somewhere():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in METHOD:
        assert f"{name}.py" in readme
    for folder in {name.split(".")[0] for name in modules() if "." in name}:
        assert f"{folder}/" in readme, folder
    for page in [ROOT / "README.md", *ROOT.glob("data/**/*.md"), *ROOT.glob("mlc_min/**/*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_every_public_name_is_there():
    assert all(callable(getattr(mlc_min, name)) for name in mlc_min.__all__)

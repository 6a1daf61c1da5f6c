"""The shape of the repository: no circle among imports, and a README that names what is there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATHS = [path for path in (ROOT / "mlc_min").rglob("*.py") if path.name != "__init__.py"]
MODULES = {f"{path.parent.name}.__main__" if path.stem == "__main__" else path.stem: path for path in PATHS}


def imported(path: Path) -> set[str]:
    """The modules of mlc_min that a file imports at its top."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlc_min."):
            last = node.module.split(".")[-1]
            names |= {last} & set(MODULES) or {alias.name for alias in node.names} & set(MODULES)
    return names


def test_imports_are_layered_without_a_circle():
    waiting = {name: imported(path) for name, path in MODULES.items()}
    while waiting:
        free = {name for name, needs in waiting.items() if not needs & set(waiting)}
        assert free, f"a circle among {sorted(waiting)}"
        waiting = {name: needs for name, needs in waiting.items() if name not in free}


METHOD = {"consistency", "preference", "states", "examples", "loop"}


def test_the_method_imports_nothing_of_ours_but_itself():
    for name in METHOD:
        assert imported(MODULES[name]) <= METHOD - {name}, name
    for name in ("consistency", "preference"):
        assert imported(MODULES[name]) == set()


def test_the_readme_names_every_module_and_every_link_leads_somewhere():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = readme.split("## What is where")[1].split("##")[0]
    assert set(re.findall(r"\w+(?=\.py)", tree)) == {path.stem for path in PATHS}
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", readme):
        assert (ROOT / target).exists(), target


def test_every_public_name_is_there():
    import mlc_min

    assert all(callable(getattr(mlc_min, name)) for name in mlc_min.__all__)

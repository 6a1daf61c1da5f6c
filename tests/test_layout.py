"""The shape of the repository: no circle among imports, and a README that names what is there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = {path.stem: path for path in (ROOT / "mlc_min").glob("*.py")}


def imported(path: Path) -> set[str]:
    """The modules of mlc_min that a file imports at its top."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {name.removeprefix("mlc_min.") for name in names if name.startswith("mlc_min.")}


def test_imports_are_layered_without_a_circle():
    waiting = {name: imported(path) for name, path in MODULES.items()}
    while waiting:
        free = {name for name, needs in waiting.items() if not needs & set(waiting)}
        assert free, f"a circle among {sorted(waiting)}"
        waiting = {name: needs for name, needs in waiting.items() if name not in free}


def test_the_losses_know_nothing_of_models_files_or_settings():
    for name in ("consistency", "preference"):
        assert imported(MODULES[name]) == set()


def test_the_readme_names_every_module_and_every_link_leads_somewhere():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = readme.split("## What is where")[1].split("##")[0]
    assert set(re.findall(r"\w+(?=\.py)", tree)) == set(MODULES) - {"__init__"}
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", readme):
        assert (ROOT / target).exists(), target


def test_every_public_name_is_there():
    import mlc_min

    assert all(callable(getattr(mlc_min, name)) for name in mlc_min.__all__)

"""A page as a notebook (nbformat 4.5): the same cells, and formulas and links as Jupyter writes them."""

import re
from pathlib import Path

START = """import os, sys

os.chdir({root!r})  # the checkout, so that mlc_min and its data are found
sys.path.insert(0, os.getcwd())
os.makedirs("runs/tutorials", exist_ok=True)  # for the pictures"""
OUTPUT = """<details>
<summary>Output</summary>

```text
{text}
```

</details>"""


def as_notebook(steps: list, ending: str, root: Path) -> dict:
    """steps, ending: what `parse` of run.py gives. root: the checkout, where the notebook's kernel goes first."""
    cells = [code_cell(START.format(root=str(root)))]
    for step in steps:
        cells += [prose_cell(step.prose), code_cell(step.code.rstrip())]
        if step.expected is not None:
            cells.append(prose_cell(OUTPUT.format(text=step.expected.rstrip())))
    cells.append(prose_cell(ending))
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": kernel}, "cells": cells}


def code_cell(source: str) -> dict:
    return {"cell_type": "code", "metadata": {}, "source": source, "execution_count": None, "outputs": []}


def prose_cell(markdown: str) -> dict:
    """Jupyter writes a formula between dollars; the next page is a notebook as well."""
    text = re.sub(r"^```math\n(.*?)^```$", r"$$\n\1$$", markdown, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"\$`(.+?)`\$", r"$\1$", text, flags=re.DOTALL)
    text = re.sub(r"\]\((\d\d-[^)]+)\.md", r"](\1.ipynb", text)
    return {"cell_type": "markdown", "metadata": {}, "source": text}

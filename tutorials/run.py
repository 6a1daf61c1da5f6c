"""Run a tutorial page: its `python` blocks in turn, in one namespace, each output beside the one the page promises.

    python tutorials/run.py               # which pages there are
    python tutorials/run.py 03            # step by step: Enter runs the next block, p opens Python, q ends
    python tutorials/run.py 03 --all      # without stopping
    python tutorials/run.py 03 --hint 1   # the first hint of its exercise; --solution shows a solution
    python tutorials/run.py --notebooks   # all pages as notebooks, for Jupyter

A `text` block below a `python` block, folded away or not, is what it prints. Words must be equal, whole numbers too; a
number with a decimal point must agree to the digits shown (0.92 stands for 0.91 to 0.93). Exit code 1 if an output
differs. Pictures go to runs/tutorials/. Solutions, fenced with ~~~, are shown by --solution and not run here;
`python -m pytest tutorials/exercises` is for them.
"""

import argparse
import code
import io
import itertools
import json
import os
import re
import shutil
import sys
import traceback
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from notebooks import as_notebook
from terminal import as_text, opened

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
sys.path.insert(0, str(ROOT))

try:
    from mlc_min.machinery.errors import Help, InputError, run_command
    from mlc_min.machinery.files import write_atomically
except ImportError as error:  # a package is not installed: one line that says which
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)

PICTURES = Path("runs/tutorials")  # where the pages' blocks save theirs; those in pictures/ are committed
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
FOLD_OPENS = re.compile(r"\s*<details>\s*<summary>[^<]*</summary>\s*")
FOLD_CLOSES = re.compile(r"\s*</details>")
COLOURS = ["\033[32m", "\033[31m", "\033[2m", "\033[0m"]  # green, red, dim, plain


@dataclass
class Step:
    """Prose, then one `python` block and the output it promises (None: nothing is promised)."""

    prose: str
    code: str
    expected: str | None
    line: int  # of the code's first line, in the file
    output: slice  # where the expected text stands in the file
    folded: bool  # whether a reader of the page has to open it


def pages() -> list[Path]:
    return sorted(FOLDER.glob("[0-9][0-9]-*.md"))


def find(number: str) -> Path:
    """The page of "03" or "3". Raises InputError if there is none."""
    for page in pages():
        if number.isdecimal() and int(page.name[:2]) == int(number):
            return page
    raise InputError(f"page {number}: there is none; the pages are {', '.join(page.name[:2] for page in pages())}")


def parse(text: str) -> tuple[list[Step], str]:
    """The steps of a page, and the prose after the last one."""
    steps: list[Step] = []
    blocks = list(FENCE.finditer(text))
    done = 0
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        if block[1] != "python":
            continue
        expected, place, end, folded = None, slice(block.end(), block.end()), block.end(), False
        between = text[block.end() : following.start()] if following and following[1] == "text" else "nothing"
        closed = FOLD_CLOSES.match(text, following.end()) if FOLD_OPENS.fullmatch(between) else None
        if closed or not between.strip():
            expected, place, end, folded = following[2], slice(*following.span(2)), following.end(), bool(closed)
            end = closed.end() if closed else end
        line = text.count("\n", 0, block.start(2)) + 1
        steps.append(Step(text[done : block.start()].strip(), block[2], expected, line, place, folded))
        done = end
    return steps, text[done:].strip()


class Echo(io.StringIO):
    """Keeps what is printed, and shows it on the screen at once."""

    def __init__(self, screen: TextIO):
        super().__init__()
        self.screen = screen

    def write(self, text: str) -> int:
        self.screen.write(text)
        self.screen.flush()
        return super().write(text)


def execute(step: Step, page: Path, namespace: dict, screen: TextIO | None = None) -> str:
    """Run the step's code in `namespace`; returns what it printed, and shows it on `screen` as it comes. An error shows
    its line in the page."""
    source = "\n" * (step.line - 1) + step.code  # so that line numbers are those of the page
    printed = io.StringIO() if screen is None else Echo(screen)
    with redirect_stdout(printed):
        exec(compile(source, str(page), "exec"), namespace)
    return printed.getvalue()


def differs(expected: str, printed: str) -> bool:
    """Whether an output is not the promised one. Blanks at the end of lines do not count.

    >>> differs("loss 0.92", "loss 0.9134"), differs("loss 0.92", "loss 0.94"), differs("2 of 3", "2 of 4")
    (False, True, True)
    """
    expected, printed = ("\n".join(line.rstrip() for line in text.strip().split("\n")) for text in (expected, printed))
    if NUMBER.split(expected) != NUMBER.split(printed):
        return True
    for want, got in zip(NUMBER.findall(expected), NUMBER.findall(printed), strict=True):
        mantissa, _, exponent = want.partition("e")
        if "." not in mantissa and not exponent:
            if want != got:
                return True
        elif abs(float(want) - float(got)) > 1.001 * 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2])):
            return True
    return False


def rewrite(text: str, outputs: list[str]) -> str:
    """The page with what the steps have printed in place of what they promised."""
    for step, printed in reversed(list(zip(parse(text)[0], outputs, strict=True))):
        if step.expected is not None:
            text = text[: step.output.start] + printed.rstrip("\n") + "\n" + text[step.output.stop :]
    return text


def fold(text: str) -> str:
    """The page with every promised output folded away, so that it does not spoil the prediction."""
    for step in reversed(parse(text)[0]):
        if step.expected is not None and not step.folded:
            start, stop = step.output.start - len("```text\n"), step.output.stop + len("```")
            block = f"<details>\n<summary>Output</summary>\n\n{text[start:stop]}\n\n</details>"
            text = text[:start].rstrip("\n") + f"\n\n{block}" + text[stop:]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tutorials/run.py", description=__doc__, formatter_class=Help)
    parser.add_argument("page", nargs="?", help="number of the page; without it, the list of pages")
    parser.add_argument("--all", action="store_true", help="do not stop before each block")
    parser.add_argument("--hint", type=int, metavar="N", help="show the N-th hint of the page and end")
    parser.add_argument("--solution", action="store_true", help="show the solution of the page's exercise and end")
    parser.add_argument("--notebooks", action="store_true", help="write each page as a notebook beside it and end")
    parser.add_argument("--write", action="store_true", help="for authors: put outputs and pictures into the page")
    parser.add_argument("--fold", action="store_true", help="for authors: fold the outputs of all pages, run nothing")
    arguments = parser.parse_args()
    if arguments.notebooks:
        for page in pages():
            steps, ending = parse(page.read_text(encoding="utf-8"))
            write_atomically(page.with_suffix(".ipynb"), json.dumps(as_notebook(steps, ending, ROOT), indent=1))
        print(f"wrote {len(pages())} notebooks into {FOLDER}")
        return
    if arguments.fold:
        for page in pages():
            write_atomically(page, fold(page.read_text(encoding="utf-8")))
        return
    if arguments.page is None:
        for page in pages():
            print(page.name[:2], page.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# "))
        return
    page = find(arguments.page)
    if arguments.hint is not None or arguments.solution:
        parts = opened(without_outputs(page.read_text(encoding="utf-8")), arguments.solution)
        chosen = parts if arguments.solution else parts[max(0, arguments.hint - 1) : arguments.hint]
        if not chosen:
            raise InputError(f"--hint {arguments.hint}: page {page.name[:2]} has hints 1 to {len(parts)}")
        print(*chosen, sep="\n\n")
        return
    os.chdir(ROOT)
    os.environ.setdefault("MPLBACKEND", "Agg")  # pictures go to files, not to windows
    PICTURES.mkdir(parents=True, exist_ok=True)
    sys.exit(walk(page, not (arguments.all or arguments.write), arguments.write))


def without_outputs(text: str) -> str:
    """The prose of a page alone."""
    steps, ending = parse(text)
    return "\n\n".join([*(step.prose for step in steps), ending])


def ask(question: str) -> str:
    try:
        return input(question).strip()
    except EOFError:
        raise InputError("nobody there to press Enter; --all runs the page without stopping") from None


def go_on(question: str, namespace: dict) -> bool:
    """Wait for Enter: True. q: False. p: a Python prompt with the page's variables, then wait again."""
    while (answer := ask(question).lower()) == "p":
        with suppress(ImportError):  # on Windows; elsewhere it makes the arrow keys work
            import readline  # noqa: F401
        namespace |= {"exit": sys.exit, "quit": sys.exit}  # Python's own would close the input for good
        with suppress(SystemExit):
            code.interact("the page's variables are here; Ctrl-D goes back to the page", local=namespace, exitmsg="")
    return answer != "q"


def walk(page: Path, stop: bool, write: bool) -> int:
    """Run the page on the screen, and `stop` before each block; returns the exit code."""
    green, red, dim, plain = COLOURS if sys.stdout.isatty() else [""] * 4
    text = page.read_text(encoding="utf-8")
    steps, ending = parse(text)
    namespace: dict = {"__name__": "__main__"}
    hints, outputs, wrong, prediction = itertools.count(1), [], 0, ""
    for number, step in enumerate(steps, 1):
        print(as_text(step.prose, hints))
        if re.search("^## ", step.prose, re.MULTILINE):  # a prediction is compared until the next part begins
            prediction = ""
        if stop and re.search(r"\bPredict\b", step.prose):
            prediction = ask(f"\n{dim}[your prediction] {plain}")
        print(f"\n{dim}--- block {number} of {len(steps)}, line {step.line} of {page.name}{plain}")
        print("\n".join(f"    {line}".rstrip() for line in step.code.rstrip().split("\n")))
        if stop and not go_on(f"{dim}[Enter runs it, p opens Python, q ends] {plain}", namespace):
            return int(wrong > 0)
        print(f"{dim}--- output{plain}")
        try:
            printed = execute(step, page, namespace, sys.stdout)
        except Exception as error:
            error.__traceback__ = error.__traceback__.tb_next.tb_next  # from the page on, without this file
            traceback.print_exception(error)
            print(f"{red}the block has failed; the page ends here{plain}")
            return 1
        outputs.append(printed)
        if prediction:
            print(f"{dim}--- you predicted: {prediction}{plain}")
        if step.expected is not None and differs(step.expected, printed) and not write:
            wrong += 1
            print(f"{red}--- the page promises something else:{plain}\n{step.expected}")
        print()
    print(as_text(ending, hints))
    if write:
        write_atomically(page, fold(rewrite(text, outputs)))
        for name in re.findall(r"\]\(pictures/(.+?)\)", text):
            shutil.copyfile(PICTURES / name, FOLDER / "pictures" / name)
        print(f"{dim}--- wrote outputs and pictures into {page.name}{plain}")
    elif wrong:
        print(f"{red}--- {wrong} of {len(steps)} outputs differ from the page{plain}")
    else:
        print(f"{green}--- all {len(steps)} blocks ran; every output is as the page says{plain}")
    if stop:
        go_on(f"{dim}[Enter ends, p opens Python] {plain}", namespace)
    return int(wrong > 0)


if __name__ == "__main__":
    run_command(main)

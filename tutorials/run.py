"""Run a tutorial page: its `python` blocks in turn, in one namespace, each output beside the one the page promises.

    python tutorials/run.py               # which pages there are
    python tutorials/run.py 03            # step by step: Enter runs the next block, q ends
    python tutorials/run.py 03 --all      # without stopping

A `text` block right below a `python` block is what it prints. Words must be equal, whole numbers too; a number with
a decimal point must agree to the digits shown (0.92 stands for 0.91 to 0.93). Exit code 1 if an output differs.
Solutions, fenced with ~~~, are shown in the page and not run here; `python -m pytest tutorials/exercises` is for them.
"""

import argparse
import io
import os
import re
import sys
import traceback
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
sys.path.insert(0, str(ROOT))

try:
    from mlc_min.machinery.errors import Help, InputError, run_command
    from mlc_min.machinery.files import write_atomically
except ImportError as error:  # a package is not installed: one line that says which
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)

FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
COLOURS = ["\033[32m", "\033[31m", "\033[2m", "\033[0m"]  # green, red, dim, plain


@dataclass
class Step:
    """Prose, then one `python` block and the output it promises (None: nothing is promised)."""

    prose: str
    code: str
    expected: str | None
    line: int  # of the code's first line, in the file
    output: slice  # where the expected text stands in the file


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
        expected, place, end = None, slice(block.end(), block.end()), block.end()
        if following and following[1] == "text" and not text[block.end() : following.start()].strip():
            expected, place, end = following[2], slice(*following.span(2)), following.end()
        line = text.count("\n", 0, block.start(2)) + 1
        steps.append(Step(text[done : block.start()].strip(), block[2], expected, line, place))
        done = end
    return steps, text[done:].strip()


def execute(step: Step, page: Path, namespace: dict) -> str:
    """Run the step's code in `namespace`; returns what it printed. An error shows its line in the page."""
    source = "\n" * (step.line - 1) + step.code  # so that line numbers are those of the page
    printed = io.StringIO()
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


def rewrite(page: Path, outputs: list[str]) -> None:
    """Put what the steps have printed in place of what they promised: for the authors of pages."""
    text = page.read_text(encoding="utf-8")
    steps, _ = parse(text)
    for step, printed in reversed(list(zip(steps, outputs, strict=True))):
        if step.expected is not None:
            text = text[: step.output.start] + printed.rstrip("\n") + "\n" + text[step.output.stop :]
    write_atomically(page, text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tutorials/run.py", description=__doc__, formatter_class=Help)
    parser.add_argument("page", nargs="?", help="number of the page; without it, the list of pages")
    parser.add_argument("--all", action="store_true", help="do not stop before each block")
    parser.add_argument("--write", action="store_true", help="for authors: put the outputs into the page")
    arguments = parser.parse_args()
    if arguments.page is None:
        for page in pages():
            print(page.name[:2], page.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# "))
        return
    page = find(arguments.page)
    os.chdir(ROOT)
    os.environ.setdefault("MPLBACKEND", "Agg")  # pictures go to files, not to windows
    sys.exit(walk(page, arguments.all or arguments.write, arguments.write))


def walk(page: Path, without_stopping: bool, write: bool) -> int:
    """Run the page on the screen; returns the exit code."""
    green, red, dim, plain = COLOURS if sys.stdout.isatty() else [""] * 4
    steps, ending = parse(page.read_text(encoding="utf-8"))
    namespace: dict = {"__name__": "__main__"}
    outputs = []
    wrong = 0
    for number, step in enumerate(steps, 1):
        print(f"{step.prose}\n\n{dim}--- block {number} of {len(steps)}, line {step.line} of {page.name}{plain}")
        print("\n".join(f"    {line}".rstrip() for line in step.code.rstrip().split("\n")))
        try:
            if not without_stopping and input(f"{dim}[Enter runs it, q ends] {plain}").strip().lower() == "q":
                return int(wrong > 0)
        except EOFError:
            raise InputError("nobody there to press Enter; --all runs the page without stopping") from None
        try:
            printed = execute(step, page, namespace)
        except Exception as error:
            error.__traceback__ = error.__traceback__.tb_next.tb_next  # from the page on, without this file
            traceback.print_exception(error)
            print(f"{red}the block has failed; the page ends here{plain}")
            return 1
        outputs.append(printed)
        print(f"{dim}--- output{plain}\n{printed}")
        if step.expected is not None and differs(step.expected, printed) and not write:
            wrong += 1
            print(f"{red}--- the page promises something else:{plain}\n{step.expected}")
    print(ending)
    if write:
        rewrite(page, outputs)
        print(f"{dim}--- wrote the outputs into {page.name}{plain}")
    elif wrong:
        print(f"{red}--- {wrong} of {len(steps)} outputs differ from the page{plain}")
    else:
        print(f"{green}--- all {len(steps)} blocks ran; every output is as the page says{plain}")
    return int(wrong > 0)


if __name__ == "__main__":
    run_command(main)

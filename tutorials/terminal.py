"""A page's Markdown for a terminal: a formula, a picture and a folded part become one line of text each."""

import re
import unicodedata
from collections.abc import Iterator

TOKEN = re.compile(r"\\partial\s+|\\[A-Za-z]+|\\.|\s+|.", re.DOTALL)
COMMENT = re.compile(r"^ *<!--.*?-->\n| *<!--.*?-->", re.DOTALL | re.MULTILINE)
MATH = re.compile(r"^```math\n(.*?)^```$|\$`(.+?)`\$", re.MULTILINE | re.DOTALL)
FOLD = re.compile(r"<details>\s*<summary>(.*?)</summary>\s*(.*?)\s*</details>", re.DOTALL)
SUBSCRIPTS = str.maketrans("0123456789+-=()aehijklmnoprstuvx", "₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₐₑₕᵢⱼₖₗₘₙₒₚᵣₛₜᵤᵥₓ")
SUPERSCRIPTS = str.maketrans("0123456789+-=()abcdefghijklmnoprstuvwxyzT⊤", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿᵒᵖʳˢᵗᵘᵛʷˣʸᶻᵀᵀ")
SYMBOLS = {
    "sum": "Σ", "prod": "Π", "int": "∫", "partial": "∂", "nabla": "∇", "infty": "∞", "ell": "ℓ", "top": "⊤",
    "in": "∈", "le": "≤", "leq": "≤", "ge": "≥", "geq": "≥", "ne": "≠", "neq": "≠", "approx": "≈", "propto": "∝",
    "cdot": "·", "times": "×", "pm": "±", "to": "→", "mapsto": "↦", "Rightarrow": "⇒", "mid": "|", "lVert": "‖",
    "rVert": "‖", "Vert": "‖", "dots": "…", "ldots": "…", "cdots": "…", "quad": "  ", "qquad": "    ",
    **dict.fromkeys(("left", "right", "big", "Big", "bigl", "bigr", "displaystyle", "begin", "end", "!"), ""),
    **dict.fromkeys((",", ";", ":", " "), " "), "{": "{", "}": "}", "|": "‖", "\\": ", ",
}  # fmt: skip


def one_line(formula: str) -> str:
    r"""A TeX formula as one line of Unicode.

    >>> one_line(r"\frac1N \sum_n \frac{2}{L(L-1)} \sigma_{nj}^2 \text{ in } Z^\top, e^{-1/\tau}, \log \frac{\sqrt m}2")
    '1/N Σₙ 2/(L(L-1)) σₙⱼ² in Zᵀ, e^(-1/τ), log(√m/2)'
    """
    tokens = iter(TOKEN.findall(re.sub(r"\\(log|exp)\s*\\frac", r"\\\1\\whole", formula)))
    return " ".join(_sequence(tokens).split())


def _sequence(tokens) -> str:
    """What stands before the end of the formula or of its group."""
    text = ""
    for token in tokens:
        if token == "}":
            break
        text += _meaning(token, tokens)
    return text


def _meaning(token: str, tokens) -> str:
    """One token with its arguments, which are taken from `tokens`."""
    if token == "{":
        return _sequence(tokens)
    if token == "&":
        return ""
    if token in "_^":
        what = _argument(tokens)
        small = what.translate(SUBSCRIPTS if token == "_" else SUPERSCRIPTS)
        replaced = all(before != after for before, after in zip(what, small, strict=True))
        return small if replaced else token + _in_brackets(what)
    if not token.startswith("\\"):
        return token
    name = token[1:].rstrip()
    if name in ("frac", "tfrac", "dfrac"):
        return _in_brackets(_argument(tokens)) + "/" + _in_brackets(_argument(tokens))
    if name == "whole":  # a fraction of which the logarithm is taken
        return f"({_meaning(chr(92) + 'frac', tokens)})"
    if name == "sqrt":
        return "√" + _in_brackets(_argument(tokens))
    if name in ("begin", "end"):  # of an array: its rows are separated by commas
        _argument(tokens)
    if name in SYMBOLS:
        return SYMBOLS[name]
    if name in ("text", "mathrm", "mathbf", "mathcal", "operatorname"):
        next(tokens)  # its brace
        return _sequence(tokens)
    try:
        size = "SMALL" if name.islower() else "CAPITAL"
        return unicodedata.lookup(f"GREEK {size} LETTER {name.upper().replace('LAMBDA', 'LAMDA')}")
    except KeyError:  # a function such as \log
        return name


def _argument(tokens) -> str:
    token = next((token for token in tokens if not token.isspace()), "}")
    return "" if token == "}" else _meaning(token, tokens).strip()


def _in_brackets(text: str) -> str:
    """Brackets around what is more than one symbol, with its indices, one number or one word."""
    return text if re.fullmatch(r"\d+|[A-Za-z]+|[∂√]?[^\W\d][₀-ₜᵢⱼᵣ⁰-⁹¹²³ᵀ]*", text) else f"({text})"


def is_solution(title: str) -> bool:
    """A folded part is a solution or a hint, by the title that it has."""
    return "solution" in title.lower()


def opened(markdown: str, solution: bool) -> list[str]:
    """The texts of the folded parts: of the solutions, or of the hints."""
    return [text for title, text in FOLD.findall(markdown) if is_solution(title) == solution]


def as_text(markdown: str, hints: Iterator[int]) -> str:
    """What the terminal shows. A folded part stays folded: the title says which flag opens it, a hint by its number.

    >>> print(as_text("<!-- x -->\\nSo $`\\sigma_1 \\le 1`$, [page 4](04-x.md).\\n\\n![Bar](pictures/a.png)", iter([])))
    So σ₁ ≤ 1, page 4 (04-x.md).
    <BLANKLINE>
    saved: runs/tutorials/a.png (Bar)
    """

    def title(fold: re.Match) -> str:
        flag = "--solution" if is_solution(fold[1]) else f"--hint {next(hints)}"
        return f"▸ {fold[1].strip()} (folded; {flag} shows it)"

    text = FOLD.sub(title, COMMENT.sub("", markdown))
    text = MATH.sub(lambda math: one_line(math[2]) if math[2] else f"    {one_line(math[1])}", text)
    text = re.sub(r"!\[([^\]]*)\]\(pictures/(.+?)\)", r"saved: runs/tutorials/\2 (\1)", text)
    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)]+)\)", r"\1 (\2)", text)

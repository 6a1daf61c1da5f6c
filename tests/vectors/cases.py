"""The inputs of the conformance vectors, each with the mistake that it finds. See make_vectors.py.

Drawn numbers are rounded to three digits, so that a person can read them; what can be checked by hand says so.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np


@dataclass
class Case:
    """One call of a function. `inputs`: by name, arrays, numbers and words."""

    name: str
    catches: str  # the mistake that fails here
    inputs: dict
    note: str = ""
    unique: bool = True  # False: the loss has a kink here, and all that can be asked of a gradient is to be finite
    step: float = 1e-5  # of the finite differences; for representations in lengths of the row
    tolerance: tuple[float, float] = (1e-9, 1e-9)  # of value and gradient
    float32: bool = True  # False: float32 cannot hold these inputs well enough


def digits(x, count: int = 3) -> np.ndarray:
    """Rounded to so many significant digits."""
    return np.vectorize(lambda number: float(f"{number:.{count}g}"))(x)


def draw(seed: int, *shape: int) -> np.ndarray:
    return digits(np.random.default_rng(seed).normal(size=shape))


def different_lengths(x: np.ndarray) -> np.ndarray:
    """(N, 4, d) with rows about 0.01, 1, 30 and 700 long."""
    return digits(x * np.array([0.01, 1, 30, 700])[:, None])


# --- consistency.py ---

LONG = (1e-9, 1e-29)  # rows of length 1e20 have gradients of 1e-20
SMALL = (1e-9, 1e-11)  # for gradients of 1e-3
KINK = "σ₁ = σ₂ or σ_r = 0: the gradient is not unique, and has only to be finite."


def mlc_cases() -> Iterator[Case]:
    def case(name, catches, x, tau=0.2, form="official", **more) -> Case:
        return Case(name, catches, {"representations": np.array(x, dtype=float), "tau": tau, "form": form}, **more)

    yield case(
        "two languages, by hand",
        "eigenvalues of Z Zᵀ, which are σ², in place of the singular values σ",
        [[[1, 0], [0.6, 0.8]]],
        tau=0.5,
        note="Cosine 0.6, so σ = √1.6 and √0.4, whose ratio is 1/2: the loss is log(1 + exp(-1)) = 0.3133.",
    )
    yield case("official form", "the paper's form where the official one is asked for", draw(1, 1, 4, 6))
    yield case("paper form", "the official form where the paper's is asked for", draw(1, 1, 4, 6), form="paper")
    yield case("stop-gradient", "σ₁ in the denominator of the official form differentiated", draw(2, 1, 3, 5))
    for form in ("official", "paper"):
        yield case(f"three prompts, {form}", "a sum over prompts in place of the mean", draw(3, 3, 4, 5), form=form)
    yield case(
        "prompts of different spread",
        "σ₁ of the first prompt or of the whole batch in place of each prompt's own",
        digits(draw(4, 2, 1, 5) + np.array([0.1, 2])[:, None, None] * draw(5, 2, 4, 5)),
    )
    yield case(
        "as many prompts as languages",
        "prompts grouped language-major: the first two axes swapped, which no shape shows here",
        draw(6, 3, 3, 4),
    )
    yield case("tau 0.05", "τ left out, or fixed", draw(7, 1, 4, 6), tau=0.05)
    yield case("tau 0.5, paper", "τ fixed, or multiplied by instead of divided by", draw(7, 1, 4, 6), 0.5, "paper")
    yield case("tau 0.001", "a softmax that does not take off the largest logit first", draw(8, 1, 3, 4), tau=1e-3)
    yield case("rows of different lengths", "rows not divided by their lengths", different_lengths(draw(9, 1, 4, 5)))
    line = np.array([[[1, -2, 2], [2, -4, 4], [0.5, -1, 1], [10, -20, 20]]])
    for form in ("official", "paper"):
        yield case(
            f"collinear rows, {form}",
            "the floor missed: a logit of 0 for σ = 0 belongs into the softmax",
            line,
            form=form,
            unique=False,
            note=f"log(1 + 2 exp(-s/τ)), s = {'1' if form == 'official' else '√4'}. {KINK}",
        )
        yield case(
            f"antipodal rows, {form}",
            "a loss of directions, such as the cosine: opposite rows lie on one line and reach the floor too",
            line * np.array([1, -1, -1, 1])[:, None],
            form=form,
            unique=False,
            note=f"The value of `collinear rows, {form}`. {KINK}",
        )
        yield case(
            f"orthogonal rows, {form}",
            "the ceiling, log r, missed, as by a softmax over the wrong number of singular values",
            [[[2, 0, 0, 0], [0, 0, 3, 0], [0, 0.5, 0, 0]]],
            form=form,
            unique=False,
            note=f"log 3. {KINK}",
        )
        yield case(
            f"more languages than dimensions, {form}",
            "m singular values where there are r = min(m, d), as by eigenvalues of Z Zᵀ",
            draw(10, 1, 5, 3),
            form=form,
        )
        yield case(f"one language, {form}", "anything but 0 where nothing can disagree", draw(12, 2, 1, 4), form=form)
    yield case(
        "fewer languages than dimensions",
        "d singular values where there are r = min(m, d), as by eigenvalues of Zᵀ Z",
        draw(11, 1, 2, 5),
    )
    yield case("one dimension", "anything but 0 where all rows lie on the one line there is", [[[2], [-0.5], [30]]])
    for name, rows in (("identical rows", [[3, 4, 0]] * 2), ("a repeated row", [[3, 4, 0], [3, 4, 0], [0, 0, 5]])):
        yield case(
            name,
            "NaN in the gradient where a singular value is 0, as by the square root of an eigenvalue",
            [rows],
            unique=False,
            note=KINK,
        )
    yield case("repeated rows in the plane", "repeated rows counted once", [[[1, 2], [2, -0.5], [1, 2], [1, 2]]])
    yield case(
        "two equal lesser singular values",
        "a gradient through singular vectors, which is infinite where values are equal",
        [[[1, 1, 0], [1, 0, 1], [0, 1, 1]]],
        note="σ = √2, √½, √½. The two equal ones have equal shares in the loss, so the gradient is unique.",
    )
    base, noise = draw(13, 1, 1, 5), draw(14, 1, 4, 5)
    through_gram = "a gradient through eigenvalues of Z Zᵀ, which square the spread and lose half the digits"
    yield case("rows 1 % apart", f"{through_gram}, in float32", digits(base + 1e-2 * noise, 5), tolerance=SMALL)
    yield case(
        "rows 0.001 % apart",
        f"{through_gram}, in float64",
        digits(base + 1e-5 * noise, 8),
        step=3e-8,
        tolerance=(1e-9, 3e-11),
        float32=False,
        note="Not for float32, which holds the first two digits of the spread.",
    )
    x = draw(15, 1, 3, 4)
    yield case(
        "very long rows",
        "squares of entries, which overflow in float32",
        digits(1e20 * x),
        tolerance=LONG,
        note="The gradient is of the size 1e-20, hence its tolerance.",
    )
    yield case(
        "very short rows",
        "a constant such as 1e-12 added to the lengths; squares of entries, which vanish in float32",
        digits(1e-20 * x),
    )
    yield case("long and short rows", "one scale for all rows", digits(x * np.array([1e-6, 1e6, 1])[:, None]))


def cosine_cases() -> Iterator[Case]:
    def case(name, catches, x, **more) -> Case:
        return Case(name, catches, {"representations": np.array(x, dtype=float)}, **more)

    yield case("two languages, by hand", "the cosine in place of 1 - cosine", [[[1, 0], [0.6, 0.8]]], note="1 - 0.6.")
    yield case("generic", "pairs of a row with itself counted", draw(21, 1, 4, 6))
    yield case("three prompts", "a sum over prompts in place of the mean", draw(22, 3, 4, 5))
    yield case("as many prompts as languages", "prompts grouped language-major", draw(23, 3, 3, 4))
    yield case("rows of different lengths", "rows not divided by their lengths", different_lengths(draw(24, 1, 4, 5)))
    yield case(
        "antipodal rows",
        "the absolute value or the square of the cosine: opposite rows are as wrong as can be",
        [[[1, 2], [-3, -6]]],
        note="Cosine -1, so the loss is 2.",
    )
    yield case("identical rows", "a sum over pairs in place of the mean", [[[1, 2, 0]] * 4], note="0, as its gradient.")
    yield case("one language", "0/0: there is no pair, and the loss is 0", draw(25, 2, 1, 4))
    x = digits(1e20 * draw(26, 1, 3, 4))
    yield case("very long rows", "squares of entries, which overflow in float32", x, tolerance=LONG)


# --- preference.py ---


def logps_cases() -> Iterator[Case]:
    def case(name, catches, states, input_ids, response_mask, **more) -> Case:
        inputs = {
            "states": np.array(states, dtype=float),
            "input_ids": np.array(input_ids),
            "response_mask": np.array(response_mask, dtype=bool),
        }
        # These are computed in float32 whatever comes in: it holds all the digits that a log-probability has.
        return Case(name, catches, inputs, tolerance=(1e-6, 1e-6), **more)

    ids = [[3, 1, 2, 0, 1, 2], [1, 2, 3, 3, 0, 1]]
    yield case(
        "all tokens equally likely, by hand",
        "the prompt counted",
        np.zeros((2, 6, 4)),
        ids,
        [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1]],
        note="-3 log 4 and -log 4.",
    )
    perfect = np.zeros((2, 6, 4))
    for row, t in np.ndindex(2, 5):
        perfect[row, t, ids[row][t + 1]] = 50
    yield case(
        "a model that predicts perfectly",
        "the shift by one missing: position t - 1 predicts token t",
        perfect,
        ids,
        [[0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]],
        note="Both sums are 0.",
    )
    yield case(
        "responses of different lengths",
        "a mean over tokens where DPO sums",
        draw(31, 2, 6, 4),
        ids,
        [[0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]],
    )
    padded, prompted = draw(32, 2, 6, 4), draw(33, 2, 6, 4)
    padded[0, 3:] *= 100
    prompted[:, :3] *= 100
    yield case(
        "padding on the right",
        "padding counted",
        digits(padded),
        ids,
        [[0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]],
        note="The first row ends after three tokens; behind them are logits a hundred times as large.",
    )
    yield case(
        "a prompt that the model finds unlikely",
        "the prompt counted",
        digits(prompted),
        ids,
        [[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1]],
    )
    yield case(
        "padding token equal to the end token",
        "a mask made anew from token values: the end token left out, or padding of the same value counted",
        draw(34, 2, 6, 4),
        [[3, 1, 2, 2, 2, 2], [1, 3, 1, 3, 0, 2]],
        [[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1]],
        note="Token 2 ends a response and fills the rest. The first row's response is 1, 2.",
    )
    yield case(
        "a response of one token, the last",
        "the last token lost, as by cutting the ids like the logits",
        draw(35, 1, 4, 4),
        [[3, 1, 2, 0]],
        [[0, 0, 0, 1]],
    )
    yield case(
        "logits of 1000",
        "a softmax that does not take off the largest logit first",
        [[[1000, -1000, 998, 0], [-1000, -1001, -1000, -1002], [0, 0, 1000, 1000], [0, 0, 0, 0]]],
        [[3, 2, 1, 3]],
        [[0, 1, 1, 1]],
    )
    yield case(
        "a mask with a gap",
        "the mask read as the first and the last token of one span",
        draw(36, 1, 6, 4),
        ids[:1],
        [[0, 1, 1, 0, 0, 1]],
        note="As in a conversation of several turns.",
    )


def policy_logps(chosen, rejected) -> dict:
    return {
        "policy_chosen_logps": np.array(chosen, dtype=float),
        "policy_rejected_logps": np.array(rejected, dtype=float),
    }


def reference_logps(chosen, rejected) -> dict:
    return {
        "reference_chosen_logps": np.array(chosen, dtype=float),
        "reference_rejected_logps": np.array(rejected, dtype=float),
    }


def lengths(chosen, rejected) -> dict:
    return {"chosen_lengths": np.array(chosen), "rejected_lengths": np.array(rejected)}


CHOSEN, REJECTED = np.array([-12.5, -20.25, -31.0, -17.5]), np.array([-14.0, -18.75, -30.5, -25.0])
GENERIC = policy_logps(CHOSEN, REJECTED)
UNEQUAL = GENERIC | lengths([9, 20, 3, 14], [11, 7, 30, 14])
EQUAL_PER_TOKEN = policy_logps([-6], [-60]) | lengths([3], [30])
WRITTEN_OUT = "log(sigmoid(x)) or log(1 + exp(-x)) written out, infinite at -1000"


def sft_cases() -> Iterator[Case]:
    def case(name, catches, logps, tokens, note="") -> Case:
        return Case(name, catches, {"policy_chosen_logps": np.array(logps), "chosen_lengths": np.array(tokens)}, note)

    yield case("generic", "a sum over tokens in place of the mean", [-12.5, -3.25, -40.0], [10, 2, 16])
    yield case(
        "3 and 30 tokens",
        "a mean over all tokens of the batch, in which long responses weigh more",
        [-6.0, -15.0],
        [3, 30],
        "Per token 2 and 0.5, each row by itself.",
    )
    yield case("one token", "a length that leaves out the end token, and so divides by 0", [-1.5], [1])


def dpo_cases() -> Iterator[Case]:
    def case(name, catches, policy, reference, beta=0.1, note="") -> Case:
        return Case(name, catches, policy | reference | {"beta": beta}, note)

    generic = reference_logps([-13.0, -19.0, -28.5, -17.0], [-13.25, -18.0, -32.0, -21.5])
    yield case(
        "policy equal to the reference",
        "a reference left out, or used for one of the two responses only",
        GENERIC,
        reference_logps(CHOSEN, REJECTED),
        note="log 2 = 0.6931 in every row.",
    )
    yield case("generic", "chosen and rejected swapped", GENERIC, generic)
    yield case(
        "a policy without a preference",
        "the reference added instead of subtracted",
        policy_logps(CHOSEN, CHOSEN),
        generic,
    )
    yield case("beta 0.5", "β fixed at 0.1", GENERIC, generic, beta=0.5)
    yield case(
        "margins of 1000 and 10000",
        WRITTEN_OUT,
        policy_logps([-10000, 0, -1000, -1], [0, -10000, -1, -1000]),
        reference_logps([0] * 4, [0] * 4),
        beta=1.0,
        note="A wrong margin costs β times itself, a right one nothing.",
    )
    yield case(
        "a constant added to both responses",
        "probabilities in place of their logarithms, or a loss of more than the difference of the two",
        policy_logps(CHOSEN - 100, REJECTED - 100),
        {name: values - 250 for name, values in generic.items()},
        note="The case `generic` with 100 taken from the policy's and 250 from the reference's figures: the same loss.",
    )


def simpo_cases() -> Iterator[Case]:
    def case(name, catches, inputs, beta=2.0, gamma=1.0, note="") -> Case:
        return Case(name, catches, inputs | {"beta": beta, "gamma": gamma}, note)

    yield case("generic", "chosen and rejected swapped", UNEQUAL)
    yield case(
        "3 and 30 tokens",
        "sums where SimPO takes the mean over tokens",
        EQUAL_PER_TOKEN,
        note="-2 a token in both, so the loss is log(1 + exp(γ)) = 1.3133.",
    )
    yield case("gamma 0", "γ fixed", UNEQUAL, gamma=0.0)
    yield case("beta 10, gamma 3", "γ inside of β: β (margin - γ) in place of β margin - γ", UNEQUAL, 10.0, 3.0)
    yield case("margins of 1000", WRITTEN_OUT, policy_logps([-2000, -1], [-1, -2000]) | lengths([2, 1], [1, 2]))


def orpo_cases() -> Iterator[Case]:
    def case(name, catches, inputs, beta=0.1, **more) -> Case:
        return Case(name, catches, inputs | {"beta": beta}, **more)

    yield case(
        "one half and one quarter, by hand",
        "the ratio of probabilities in place of the ratio of odds",
        policy_logps([2 * np.log(0.5)], [4 * np.log(0.25)]) | lengths([2], [4]),
        note="p = 1/2 and 1/4 a token, odds 1 and 1/3, so the loss is log 2 + 0.1 log(1 + 1/3) = 0.7219.",
    )
    yield case("generic", "chosen and rejected swapped", UNEQUAL)
    yield case("beta 1", "β fixed at 0.1", UNEQUAL, beta=1.0)
    yield case(
        "3 and 30 tokens",
        "sums where ORPO takes the mean over tokens",
        EQUAL_PER_TOKEN,
        note="2 + 0.1 log 2: equal odds.",
    )
    yield case(
        "nearly certain responses",
        "log(1 - exp(x)) written out, which in float32 loses its digits near 0",
        policy_logps([-1e-5, -1, -2e-5], [-1, -1e-5, -8e-5]) | lengths([1, 1, 2], [1, 1, 2]),
        step=1e-7,
    )
    for x in (-1e-8, 0.0):
        yield case(
            f"certain responses, {x:g}",
            "log(1 - exp(x)) with no bound, infinite at 0 and, written out in float32, at -1e-8",
            policy_logps([x, -1, x], [-1, x, x]) | lengths([1, 1, 1], [1, 1, 1]),
            step=1e-7,
            note="Convention: in log(1 - p) a mean log-probability above -1e-6 counts as -1e-6, a constant without"
            " gradient, as if p were 1 - 1e-6. The log p beside it, and the SFT term, are left as they are.",
        )


# --- metrics.py ---


def safety_cases() -> Iterator[Case]:
    """Verdicts, a row per prompt: 1 safe, 0 not safe, - none."""

    def case(name, catches, rows, note="") -> Case:
        verdict = {"1": True, "0": False, "-": None}
        return Case(name, catches, {"safe": [[verdict[letter] for letter in row] for row in rows.split()]}, note)

    yield case("by hand", "population variance confused with sample variance", "11 10", "Rates 100 and 50, var 6.25.")
    yield case("four languages", "pag as the share of prompts on which all languages agree", "1111 1100 1010 0001 1101")
    yield case("all safe", "no figure, or 0/0, where all verdicts are the same", "111 111")
    yield case("none safe", "pag as the share of pairs that are both safe: two unsafe verdicts agree too", "000 000")
    yield case("missing verdicts", "a missing verdict counted as unsafe", "11- -01 10- 111")
    yield case(
        "prompts with few verdicts",
        "pag pooled over all pairs: each prompt with a pair weighs the same, one without a pair nothing",
        "1110 11-- 0--- ----",
    )
    yield case(
        "a language without a verdict", "a rate of 0, or a mean of the others, where there is no figure", "1-0 1-1"
    )
    yield case("one language", "0/0 in pag: there is no pair, so no figure", "1 0 1")


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "mlc_loss": mlc_cases,
    "cosine_loss": cosine_cases,
    "sequence_logps": logps_cases,
    "sft_loss": sft_cases,
    "dpo_loss": dpo_cases,
    "simpo_loss": simpo_cases,
    "orpo_loss": orpo_cases,
    "safety_table": safety_cases,
}

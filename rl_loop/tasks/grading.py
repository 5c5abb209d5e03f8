"""Grading: whether a response's answer is right, as mathematics, as text or as a choice.

    grader    right answer                      also right            wrong
    math      1/2, x+1, (1,2), 12 km            0.5, 1+x, (1, 2), 12  1/3
    text      Paris, yes, New York              "paris.", the Paris   Paris, France
    choice    B                                 (b), B) Paris         C

For math, a plain number in a sentence counts too: `it is 7`.
"""

import re
import unicodedata
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

from rl_loop.task_config import Grader

WRAPPING = re.compile(r"\\(?:boxed|text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}|[$`]|\*\*|\\[()\[\]]")
COMMAND = re.compile(r"\\(?:begin|end)\{\w+\*?\}|\\[A-Za-z]+")
FUNCTION = re.compile(r"(?<![A-Za-z\\])(sin|cos|tan|log|ln|exp|pi)(?![A-Za-z])")
CONNECTIVE = re.compile(r"\b(?:sqrt|and|or)\b")
SCIENTIFIC = re.compile(r"(\d)[eE]([-+]?\d+)\b")
MIXED = re.compile(r"(?<![\d.,/])(\d+) (\d+/\d+)(?![\d.,/])")
WORD = re.compile(r"[^\W\d_]{3,}|^\W*[^\W\d_]{2,}\W*$")
NUMBER_AND_WORD = re.compile(r"[-+−]?\d[\d.,/ ]*%?\s*[^\W\d_]+\W*")
LETTER = re.compile(r"\W*([A-Za-z])\W*")
LETTER_FIRST = re.compile(r"\W*([A-Za-z])[).:]\s")
LETTER_ALONE = re.compile(r"(?<!\w)[A-Z](?![\w'’])")
PUNCTUATION = " \t\n.,;:!?\"'“”‘’()[]"


def check_answer(grader: Grader, answer: Any) -> None:
    """Raises ValueError for a right answer that `grader` cannot read: no response could equal it."""
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError(f"`answer` is {answer!r}, neither text nor a number")
    text = str(answer)
    if not text.strip():
        raise ValueError("`answer` is empty")
    if grader == "math" and (not is_formula(text) or (has_words(text) and not re.search(r"[\d=+*/^<>_|\\-]", text))):
        raise ValueError(
            f'`answer` {text!r} is not a number or a formula; task.grader = "text" or "auto" can compare it'
        )
    if grader == "choice" and chosen(text) is None:
        raise ValueError(f'`answer` {text!r} is not the letter of a choice; task.grader = "auto" can compare it')


def grade(grader: Grader, answer: str, given: str) -> float:
    """1.0 if `given`, which was found in a response, is the right `answer`, else 0.0."""
    match grader_of(answer) if grader == "auto" else grader:
        case "choice":
            return float(chosen(answer) == (chosen(given) or last_letter(given)))
        case "text":
            return float(normalised(answer) == normalised(given))
    right = formula(answer)
    # `given` as one formula, or else as a sentence with a number in it.
    return float(verify(right, formula(given)) or verify(right, parse(given)))


def grader_of(answer: str) -> Grader:
    """The grader that "auto" chooses for a right answer. jsonl_task.py describes the rule in words."""
    bare = unwrapped(answer)
    if re.fullmatch(r"\(?[A-Z]\)?[.:]?", bare):
        return "choice"
    return "text" if has_words(bare) or not is_formula(answer) else "math"


def has_words(bare: str) -> bool:
    """Whether the text has words. math-verify would read words as products of variables."""
    without_names = CONNECTIVE.sub(" ", FUNCTION.sub(" ", COMMAND.sub(" ", bare)))
    return WORD.search(without_names) is not None and NUMBER_AND_WORD.fullmatch(bare) is None


@lru_cache(maxsize=4096)
def formula(text: str) -> list[Any]:
    """The text as math-verify reads it when it is one LaTeX formula: sympy expressions, and texts that it cannot read.

    By default math-verify looks for numbers in a sentence: it would find 2 in `(1, 2)` and nothing in `x+1`.
    """
    text = MIXED.sub(r"(\1+\2)", text.replace("\\$", ""))  # an escaped dollar is a currency sign
    if re.search(r"\$|\\\(|\\\[|\\boxed", text):
        return parse(text)
    text = SCIENTIFIC.sub(r"\1 \\times 10^{\2}", FUNCTION.sub(r"\\\1", text.replace("**", "^")))
    return parse(f"${text}$")


def is_formula(text: str) -> bool:
    return any(not isinstance(read, str) for read in formula(text))


def normalised(text: str) -> str:
    """The text as it is compared: lower case, without markup, leading article, or punctuation and spaces around it."""
    words = unicodedata.normalize("NFKC", unwrapped(text)).casefold().split()
    bare = re.sub(r"^(?:the|an|a)\s+", "", " ".join(words).strip(PUNCTUATION))
    return bare or " ".join(words)


def chosen(text: str) -> str | None:
    """The letter of `B`, `(b)`, `**B**` or `B) Paris`, as a capital."""
    bare = unwrapped(text)
    letter = LETTER.fullmatch(bare) or LETTER_FIRST.match(bare)
    return letter[1].upper() if letter else None


def last_letter(text: str) -> str | None:
    """The last capital that stands alone: `The answer is B.`"""
    letters = LETTER_ALONE.findall(unwrapped(text))
    return letters[-1] if letters else None


def unwrapped(text: str) -> str:
    """The text without LaTeX and Markdown around it: `\\boxed{\\text{Paris}}` becomes Paris."""
    while (bare := WRAPPING.sub(r"\1", text)) != text:
        text = bare
    return text.strip()

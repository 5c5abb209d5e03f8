"""Worked solutions of chain sums, which the demo policy is trained to write.

    42 + 81 - 156  ->  42+81:2+1=3,4+8=12=123;123-156=-(156-123):6-3=3,5-2=3,1-1=0=-33;Answer: -33

Each step adds the next term to the running total or subtracts it, column by column from the right. If a difference is
below zero, the operands are swapped first. A carry is `+1` in the next column, and a borrow is `-1`.

The teacher is fallible: with a given probability the last digit of a column is wrong, and later columns build on it. So
the policy learns the method and the errors, and reinforcement learning can unlearn the errors.
"""

import random
from collections.abc import Callable

Slip = Callable[[], bool]


def columns(left: int, right: int, sign: str, draw: random.Random, slip: Slip) -> tuple[str, int]:
    """The columns of `left sign right`, and the result that they give.

    An addition takes any left, right >= 0, and a subtraction takes left >= right >= 0.
    """
    a, b = str(left)[::-1], str(right)[::-1]
    written, digits, carry = [], "", 0
    for i in range(max(len(a), len(b))):
        x, y = int(a[i]) if i < len(a) else 0, int(b[i]) if i < len(b) else 0
        value = x + y + carry if sign == "+" else x - y - carry
        shown = f"{x}{sign}{y}" + (f"{sign}1" if carry else "")
        if sign == "-" and value < 0:  # borrow: add ten to this column
            value, carry, shown = value + 10, 1, f"1{shown}"
        else:
            carry = value // 10 if sign == "+" else 0
        if slip():
            value = value - value % 10 + (value + draw.randrange(1, 10)) % 10
        written.append(f"{shown}={value}")
        digits = str(value % 10) + digits
    if carry and sign == "+":
        digits = "1" + digits
    return ",".join(written), int(digits)


def step(total: int, sign: str, term: int, draw: random.Random, slip: Slip) -> tuple[str, int]:
    """The step `total sign term` with its working, and its result."""
    if sign == "+" and total >= 0:
        work, result = columns(total, term, "+", draw, slip)
        head = f"{total}+{term}"
    elif sign == "-" and total < 0:  # -a - b = -(a + b)
        work, magnitude = columns(-total, term, "+", draw, slip)
        head, result = f"{total}-{term}=-({-total}+{term})", -magnitude
    else:  # a difference of two magnitudes: the larger comes first
        is_negative = (total + term if sign == "+" else total - term) < 0
        larger, smaller = max(abs(total), term), min(abs(total), term)
        work, magnitude = columns(larger, smaller, "-", draw, slip)
        head, result = f"{total}{sign}{term}", -magnitude if is_negative else magnitude
        if total < 0 or is_negative:
            head += f"={'-' if is_negative else ''}({larger}-{smaller})"
    return f"{head}:{work}={result};", result


def solution(expression: str, seed: int = 0, slips: float = 0.0) -> str:
    """The worked solution of `a + b - c ...` (terms and signs separated by blanks). It ends with `Answer: N`.

    Each column is wrong with probability `slips`. The same seed makes the same columns wrong.
    """
    draw = random.Random(seed)
    terms = expression.split()
    total, lines = int(terms[0]), []
    for sign, term in zip(terms[1::2], terms[2::2], strict=True):
        line, total = step(total, sign, int(term), draw, lambda: draw.random() < slips)
        lines.append(line)
    return "".join(lines) + f"Answer: {total}"

"""Worked solutions of chain sums: what the demo policy is taught to write.

    42 + 81 - 156  ->  42+81:2+1=3,4+8=12=123;123-156=-(156-123):6-3=3,5-2=3,1-1=0=-33;Answer: -33

Each step adds or subtracts the next term from the running total, column by column from the right. A subtraction that
goes below zero is turned round first. Carries are `+1`, borrows `-1` in the next column.
"""


def columns(left: int, right: int, sign: str) -> str:
    """Column-by-column `left sign right` for left >= right >= 0 (subtraction) or any left, right >= 0 (addition)."""
    a, b = str(left)[::-1], str(right)[::-1]
    written, carry = [], 0
    for i in range(max(len(a), len(b))):
        x, y = int(a[i]) if i < len(a) else 0, int(b[i]) if i < len(b) else 0
        value = x + y + carry if sign == "+" else x - y - carry
        shown = f"{x}{sign}{y}" + (f"{sign}1" if carry else "")
        if sign == "-" and value < 0:  # borrow: ten is added to this column
            value, carry, shown = value + 10, 1, f"1{shown}"
        else:
            carry = value // 10 if sign == "+" else 0
        written.append(f"{shown}={value}")
    return ",".join(written)


def step(total: int, sign: str, term: int) -> str:
    """One step `total sign term` with its working and result."""
    result = total + term if sign == "+" else total - term
    if sign == "+" and total >= 0:
        work = columns(total, term, "+")
        head = f"{total}+{term}"
    elif sign == "-" and total < 0:  # -a - b = -(a + b)
        work = columns(-total, term, "+")
        head = f"{total}-{term}=-({-total}+{term})"
    else:  # a difference of two magnitudes: the larger one goes first
        magnitude = abs(total)
        larger, smaller = max(magnitude, term), min(magnitude, term)
        work = columns(larger, smaller, "-")
        head = f"{total}{sign}{term}"
        turned = f"{'-' if result < 0 else ''}({larger}-{smaller})"
        if total < 0 or result < 0:
            head += f"={turned}"
    return f"{head}:{work}={result};"


def solution(expression: str) -> str:
    """The worked solution of `a + b - c ...` (terms and signs separated by blanks), ending in `Answer: N`."""
    terms = expression.split()
    total, lines = int(terms[0]), []
    for sign, term in zip(terms[1::2], terms[2::2], strict=True):
        lines.append(step(total, sign, int(term)))
        total = total + int(term) if sign == "+" else total - int(term)
    return "".join(lines) + f"Answer: {total}"

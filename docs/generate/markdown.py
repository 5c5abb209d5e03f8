"""Markdown of the generated pages: their head, their tables, and code inside a table."""

import re
import textwrap
from collections.abc import Iterable, Sequence

WIDTH = 120
"""characters of a line of prose"""
NAME = re.compile(r"(?<![\w/.-])[A-Za-z_][\w/]*(?:\.\w+)*")
LIKE_CODE = re.compile(r".*_.*|.*\.(py|toml|jsonl?)")
"""names of fields, functions and files"""


def compose(title: str, gloss: str, source: str, *parts: str) -> str:
    """A whole page. `gloss` is the sentence that the index of pages shows, `source` the code that the page shows."""
    head = [f"# {title}", fill(gloss), fill(f"`make docs` writes this page from {source}.")]
    return "\n\n".join([*head, *(part.strip("\n") for part in parts if part)]) + "\n"


def fill(paragraph: str) -> str:
    return textwrap.fill(paragraph, WIDTH, break_long_words=False, break_on_hyphens=False)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(" ".join(cell.split()).replace("|", r"\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def code(text: str) -> str:
    """Inline code. A `|` would end the cell of a table, so such code is written in HTML."""
    if "|" not in text:
        return f"`{text}`"
    return f"<code>{text.replace('&', '&amp;').replace('<', '&lt;').replace('|', '&#124;')}</code>"


def marked(text: str) -> str:
    """A text of the code's as one line, in which names of the code are inline code."""
    parts = " ".join(text.split()).split("`")
    parts[::2] = [NAME.sub(lambda n: f"`{n[0]}`" if LIKE_CODE.fullmatch(n[0]) else n[0], part) for part in parts[::2]]
    return "`".join(parts)


def sentence(text: str) -> str:
    """The same, with a full stop."""
    return marked(text.rstrip().removesuffix(".") + ".") if text else ""


def alternatives(words: Sequence[str]) -> str:
    """`a`, `b` or `c`"""
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))

"""Messages in the tables of the pages on troubleshooting, and how they compare with those of the source."""

import re
from collections.abc import Collection, Iterator, Mapping
from html import unescape

from documents.errors import VARIES
from documents.pages import CODE, Page

IN_TABLE = re.compile(rf"{CODE.pattern}|<code>(.*?)</code>")
"""a `|` would end the cell, so code with one stands in HTML"""
LEAST = 20
"""letters that a message in a page needs if it is shorter than the source's: fewer could mean many messages"""


def shown(page: Page) -> Iterator[tuple[int, str]]:
    """(line, message) of each message in a table whose first column is called so."""
    inside = False
    for number, line in enumerate(page.prose.splitlines(), start=1):
        first = re.split(r"(?<!\\)\|", line)[1].strip() if line.startswith("|") else ""
        inside = first == "message" or (inside and bool(first))
        for code in IN_TABLE.finditer(first) if inside else ():
            yield number, unescape(code[3] or "") or code[2].strip().replace(r"\|", "|")


def is_of(page_message: str, message: str) -> bool:
    """Whether the page's message is the source's. It may leave out more: `…` stands for any text."""
    if page_message == message:
        return True
    pattern = ".*".join(map(re.escape, page_message.split(VARIES)))
    enough = sum(letter.isalpha() for letter in page_message) >= LEAST
    return enough and re.fullmatch(pattern, message) is not None


def differences(pages: Collection[Page], messages: Mapping[str, list[str]]) -> Iterator[str]:
    """What the pages lack, and what they have although the source has no such message. `messages`: each with its places
    in the source."""
    told = [(f"{page.name}:{line}", message) for page in pages for line, message in shown(page)]
    for message, places in messages.items():
        if not any(is_of(page_message, message) for _, page_message in told):
            yield f"{places[0]}: in no page: {message}"
    for place, page_message in told:
        if not any(is_of(page_message, message) for message in messages):
            yield f"{place}: not in the source: {page_message}"

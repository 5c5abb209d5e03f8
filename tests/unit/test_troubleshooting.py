"""Every message that the packages make for a user stands in the pages on troubleshooting, and no other."""

import pytest
from documents.errors import Source, messages
from documents.pages import ROOT, Page
from documents.troubleshooting import differences, shown

DOCS = ROOT / "docs"
MESSAGES = messages()
PAGES = [Page.read(file) for file in (DOCS / "troubleshooting.md", *sorted((DOCS / "troubleshooting").glob("*.md")))]


def test_the_pages_have_the_messages_of_the_source_and_no_others():
    assert list(differences(PAGES, MESSAGES)) == []


def page(*rows):
    lines = ["| message | cause |", "|---|---|", *(f"| {row} | a cause with `code` |" for row in rows)]
    return Page(ROOT / "docs" / "page.md", "\n".join(lines) + "\n")


def test_a_message_that_no_page_has_is_found():
    missing = {**MESSAGES, "the moon is too far away: …": ["rl_loop/moon.py:1"]}
    assert list(differences(PAGES, missing)) == ["rl_loop/moon.py:1: in no page: the moon is too far away: …"]


def test_a_message_that_the_source_does_not_have_is_found():
    invented = [*PAGES, page("`the moon is too far away: …`")]
    assert list(differences(invented, MESSAGES)) == ["docs/page.md:3: not in the source: the moon is too far away: …"]


def test_a_page_may_shorten_a_message_but_not_to_a_few_words():
    long = {"endpoint: … serves … version … of the run …. Wait until that run ends": ["rl_loop/preflight.py:1"]}
    assert list(differences([page("`endpoint: … serves … version …`")], long)) == []
    assert len(list(differences([page("`endpoint: …`")], long))) == 2


def test_code_in_the_first_column_of_such_tables_is_read():
    text = page(r"`one: …` `` `two` \| … ``", "<code>&#124;z&#124; &lt; …</code>").text
    text += "\n| field | meaning |\n|---|---|\n| `no message` | |\n\nAnd `none` here.\n"
    found = [message for _, message in shown(Page(ROOT / "docs" / "page.md", text))]
    assert found == ["one: …", "`two` | …", "|z| < …"]


MADE = {
    'raise ValueError(f"{field}: must be {least:.0f} or more")': ["…: must be … or more"],
    'message = f"no file {name!r} here"\n    raise refused("file", message, status=404)': ["no file … here"],
    'what = "a number" if x else "a list"\n    raise TypeError(f"give {what}" + f" at {x}")': [
        "give a number at …",
        "give a list at …",
    ],
    "raise ValueError(explain(x))": ["half of … is missing"],
    'raise Refused([Problem(field="a", message=LATER)], status=503)': ["try again later"],
    'logger.warning("group %s failed %d times", x, 3)': ["group … failed … times"],
    'console.print(f"[bold red]{x} rows fail[/]: look at them")': ["… rows fail: look at them"],
    'sys.exit(f"rollout-service audit: {x} is not there")': ["… is not there"],
    'raise ValueError(f"{field}: {error}")': [],
    'console.print(f"written to {x}: all of it")': [],
    'print("no message of an error")': [],
}


@pytest.mark.parametrize("body", MADE)
def test_messages_are_found_however_they_are_made(body):
    helper = 'LATER = "try again later"\ndef explain(x):\n    return f"half of {x} is missing"\n'
    found = [text for _, text in Source(f"{helper}def f(x):\n    {body}\n").messages()]
    assert list(dict.fromkeys(found)) == MADE[body]

"""Commands of a shell script, as far as documents use the shell: quotes, here-documents, pipes and redirections."""

import re
import shlex
from collections.abc import Iterator

OPERATORS = {"&&", "||", "|", "&", ";"}
REDIRECTIONS = {">", ">>", "<", ">&", "&>"}


def commands_of(script: str) -> Iterator[tuple[int, list[str]]]:
    """(line, words) of each command. Raises ValueError for a quotation without an end."""
    lines = iter(enumerate(script.splitlines()))
    for number, line in lines:
        while line.endswith("\\"):
            line = line.removesuffix("\\") + next(lines, (0, ""))[1]
        here_document = re.search(r"<<-?\s*['\"]?(\w+)['\"]?", line)
        line = re.sub(r"(?<=\s)\d(?=>)", "", line.partition("<<")[0] if here_document else line)  # 2>&1
        while (words := _words(line)) is None:
            try:
                line += "\n" + next(lines)[1]
            except StopIteration:
                raise ValueError("a quotation does not end") from None
        command: list[str] = []
        for word in words:
            if word in OPERATORS:
                yield number, command
                command = []
            elif word in REDIRECTIONS:
                next(words, None)
            else:
                command.append(word)
        yield number, command
        if here_document:
            next((line for _, line in lines if line.strip() == here_document[1]), None)


def _words(line: str) -> Iterator[str] | None:
    """None if a quotation goes on in the next line."""
    words = shlex.shlex(line, posix=True, punctuation_chars=True)
    words.whitespace_split = True
    try:
        return iter(list(words))
    except ValueError:
        return None

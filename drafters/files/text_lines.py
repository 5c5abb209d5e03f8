"""Text files in UTF-8, whose lines end at a line feed and nowhere else.

`str.splitlines`, `httpx.Response.iter_lines` and files opened as text also end lines at other characters: U+2028,
U+2029, U+0085, form feeds, carriage returns. A JSON string may hold these, and a policy may sample them. So this module
reads every file of lines.
"""

import codecs
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def read_text(file: Path) -> str:
    """The text without a byte order mark, line ends unchanged. Raises ValueError, with the line, if it is not UTF-8."""
    data = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}, line {line}: {_not_utf8(error)}") from None


def byte_lines(file: Path) -> list[bytes]:
    """The lines without their ends. The last line may be incomplete, if its writer was killed."""
    lines = file.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    return lines if lines[-1] else lines[:-1]


def json_lines(file: Path, parse: Callable[[Any], T] = lambda value: value) -> Iterator[T]:
    """Applies `parse` to the JSON value of each line that is not blank. The file is read lazily.

    Raises ValueError, which names file and line, for a line that is not UTF-8, not JSON or not valid text, and for a
    value that `parse` refuses with a ValueError or TypeError.
    """
    return (parsed for _, parsed in numbered_json_lines(file, parse))


def numbered_json_lines(file: Path, parse: Callable[[Any], T] = lambda value: value) -> Iterator[tuple[int, T]]:
    """As `json_lines`, with the number of each line, from 1."""
    with file.open("rb") as lines:  # opened as bytes: text mode ends lines at other characters too
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                parsed = parse(_value(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{file}, line {number}: {error}") from error
            yield number, parsed


def _value(line: bytes) -> Any:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(error)) from None
    value = json.loads(text)
    if "\\ud" in text or "\\uD" in text:
        _check_surrogates(value)
    return value


def _check_surrogates(value: Any) -> None:
    """JSON can escape half of a character, as in `\\ud83d`. A tokenizer cannot read it, and UTF-8 cannot encode it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(f"{half} is half of a surrogate pair, not a character; write both halves or neither") from None


def _not_utf8(error: UnicodeDecodeError) -> str:
    is_utf16 = error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return (
        f"byte 0x{error.object[error.start]:02x} is not UTF-8; save the file as UTF-8, "
        f"for example with `iconv -f {'UTF-16' if is_utf16 else 'LATIN1'} -t UTF-8`"
    )

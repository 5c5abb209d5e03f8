"""Text files: UTF-8, and a line ends at a line feed alone.

`str.splitlines`, `httpx.Response.iter_lines` and files opened as text also end lines at other characters: U+2028,
U+2029, U+0085, form feeds, carriage returns. JSON may hold these within a string, and a policy may sample them. So
every file of lines is read here.
"""

import codecs
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def read_text(file: Path) -> str:
    """Without a byte order mark, line ends as they are. Raises ValueError, naming the line, when it is not UTF-8."""
    data = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}, line {line}: {_not_utf8(error)}") from None


def byte_lines(file: Path) -> list[bytes]:
    """The lines without their ends; the last one may be half a line, where a writer was killed."""
    lines = file.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    return lines if lines[-1] else lines[:-1]


def json_lines(file: Path, parse: Callable[[Any], T] = lambda value: value) -> Iterator[T]:
    """`parse` of the JSON value of each line that is not blank; the file is read as far as it is asked for.

    Raises ValueError, naming file and line, for what is not UTF-8, not JSON or not text, and for what `parse` refuses
    with a ValueError or TypeError.
    """
    return (parsed for _, parsed in numbered_json_lines(file, parse))


def numbered_json_lines(file: Path, parse: Callable[[Any], T] = lambda value: value) -> Iterator[tuple[int, T]]:
    """As `json_lines`, each with the number of its line, from 1."""
    with file.open("rb") as lines:  # opened as bytes, since text would end lines elsewhere
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
    """JSON can write half of a character as `\\ud83d`. A tokenizer cannot read it, and UTF-8 cannot hold it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(
            f"{half} is half of a surrogate pair, and no character; write both halves or neither"
        ) from None


def _not_utf8(error: UnicodeDecodeError) -> str:
    is_utf16 = error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return (
        f"byte 0x{error.object[error.start]:02x} is not UTF-8; save the file as UTF-8, "
        f"for example with `iconv -f {'UTF-16' if is_utf16 else 'LATIN1'} -t UTF-8`"
    )

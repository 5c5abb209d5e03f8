"""TOML files that may extend others: `extends = "base.toml"` at the top of a file, relative to the file's folder.

A table is merged into the base's table of the same name, field by field. Any other value, also a list, replaces the
base's value.
"""

import tomllib
from pathlib import Path
from typing import Any

from drafters.files.home import in_home
from drafters.files.text_lines import read_text


def read_toml(file: Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The content of `file`, merged over the files that it extends.

    Raises ValueError for a file that is not TOML and for files that extend each other in a circle, and OSError for a
    file that cannot be read. An error in a base file begins with the names of the files that lead to it.
    """
    data = tomllib.loads(read_text(file))
    if "extends" not in data:
        return data
    name = data.pop("extends")
    if not isinstance(name, str):
        raise ValueError(f"extends: must be the path of a TOML file (got {name!r})")
    chain = (*extended_by, file.resolve())
    base = file.parent / in_home(Path(name))
    if base.resolve() in chain:
        raise ValueError(f"extends: {' -> '.join(map(str, (*chain, base.resolve())))} is a circle")
    try:
        return merged(read_toml(base, chain), data)
    except OSError as error:
        raise ValueError(f"extends {name}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"extends {name}: {str(error).removeprefix(f'{base}, ')}") from error


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for name, value in over.items():
        below = base.get(name)
        result[name] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result

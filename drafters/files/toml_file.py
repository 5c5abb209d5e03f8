"""TOML files, and those that they extend: `extends = "base.toml"` at the top of a file, relative to its folder.

A table goes into the base's table of the same name, field by field. Any other value, a list too, replaces the base's.
"""

import tomllib
from pathlib import Path
from typing import Any

from drafters.files.home import in_home
from drafters.files.text_lines import read_text


def read_toml(file: Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Raises ValueError for what is not TOML, and for files that extend each other in a circle; OSError for a file that
    cannot be read. What is wrong with a base is said after the names of the files that lead to it."""
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

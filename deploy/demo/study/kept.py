"""Stored results, so that an interrupted study does not measure them again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def kept(file: Path, measure: Callable[[], Any]) -> Any:
    """The content of `file`. If the file is missing, `measure` runs first, and its result is written."""
    if not file.is_file():
        found = measure()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))

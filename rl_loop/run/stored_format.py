"""Formats of stored files are numbered: what this version of rl-loop cannot read is refused before work starts."""

from pathlib import Path


class OtherFormat(ValueError):
    """The message names the file, its format and the one that is needed."""


def check_format(file: Path, found: object, needed: int) -> None:
    """Raises OtherFormat."""
    if found == needed:
        return
    is_newer = isinstance(found, int) and found > needed
    raise OtherFormat(
        f"{file}: has format {found}, and this version of rl-loop reads format {needed}: it was written by "
        f"{'a newer version; update rl-loop' if is_newer else 'an older version; use that one'}"
    )

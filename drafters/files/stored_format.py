"""Format numbers of stored files: a file of another format is refused, not misread."""

from pathlib import Path


class OtherFormat(ValueError):
    """A file or folder has format `found`, but this version reads format `read`. `instead` says what to do."""

    def __init__(self, path: Path, found: object, read: int, instead: str):
        super().__init__(f"{path} has format {found}, and this version reads format {read}: {instead}")


def check_format(path: Path, found: object, read: int) -> None:
    """Raises OtherFormat when the two formats differ."""
    if found != read:
        is_newer = isinstance(found, int) and found > read
        written = "a newer version; update this one" if is_newer else "an older version; use that one"
        raise OtherFormat(path, found, read, f"it was written by {written}")

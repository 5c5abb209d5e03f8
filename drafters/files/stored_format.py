"""OtherFormat: what is stored has a format's number, and what has another one is refused rather than misread."""

from pathlib import Path


class OtherFormat(ValueError):
    """A file or folder of format `found`, where format `read` is; `instead` is what to do."""

    def __init__(self, path: Path, found: int, read: int, instead: str):
        super().__init__(f"{path} has format {found}, and this version reads format {read}: {instead}")

"""Disk space: the error of a full disk or quota says what was to be written, how much room it takes, and where."""

import errno
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

FULL = (errno.ENOSPC, errno.EDQUOT)


class NoRoom(OSError):
    """The message says what was to be written, how much room it takes, and where."""


def is_full(error: BaseException) -> bool:
    """Whether the disk was full. safetensors has errors of its own, with the system's number in the text."""
    if isinstance(error, SafetensorError):
        number = re.search(r"os error (\d+)", str(error))
        return number is not None and int(number[1]) in FULL
    return isinstance(error, OSError) and error.errno in FULL


@contextmanager
def told_if_full(what: str, folder: Path, takes: Callable[[], int]) -> Iterator[None]:
    """Raises NoRoom when the disk of `folder` is full within the block; `takes` counts the bytes of `what`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not is_full(error):
            raise
        free = shutil.disk_usage(folder).free
        raise NoRoom(
            f"no room for {what}: it takes about {_mib(takes())}, and {folder} has {_mib(free)} left; "
            "make room, and go on with --resume"
        ) from error


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"

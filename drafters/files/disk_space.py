"""Disk space: errors of a full disk or quota that say what could not be written, how many bytes it takes, and where."""

import errno
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

FULL = (errno.ENOSPC, errno.EDQUOT)


class NoRoom(OSError):
    """The disk is full. The message says what could not be written, how many bytes it takes, and where."""


def is_full(error: BaseException) -> bool:
    """Whether the disk was full. safetensors raises its own error, whose text holds the system's error number."""
    if isinstance(error, SafetensorError):
        number = re.search(r"os error (\d+)", str(error))
        return number is not None and int(number[1]) in FULL
    return isinstance(error, OSError) and error.errno in FULL


@contextmanager
def told_if_full(what: str, folder: Path, takes: Callable[[], int]) -> Iterator[None]:
    """Raises NoRoom when the disk of `folder` fills up within the block. `takes` counts the bytes of `what`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not is_full(error):
            raise
        free = shutil.disk_usage(folder).free
        raise NoRoom(
            f"no room for {what}: it takes about {mib(takes())}, and {folder} has {mib(free)} left; "
            "make room, and go on with --resume"
        ) from error


def mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"

"""Patience with a service that is full or is being started again: calls that are tried again until it answers."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import httpx

from rollout_service.client import RolloutError

T = TypeVar("T")

PAUSE = 1.0
"""seconds between tries, unless the service says a shorter time"""
PASSING = (429, 500, 502, 503, 504, 507)
"""answers of the service that time mends"""


class Stopped(Exception):
    """The call was given up because its caller is to end."""


def is_passing(error: BaseException) -> bool:
    """Whether the same call may succeed later."""
    return isinstance(error, httpx.TransportError) or (isinstance(error, RolloutError) and error.status in PASSING)


def patiently(
    call: Callable[[], T],
    seconds: float,
    stopping: threading.Event | None = None,
    failed: Callable[[Exception], None] = lambda error: None,
) -> T:
    """The answer of `call`, tried for so many seconds while its error is a passing one; `failed` is told each of them.

    Raises the last error, and Stopped once `stopping` is set.
    """
    deadline, stopping = time.monotonic() + seconds, stopping or threading.Event()
    while not stopping.is_set():
        try:
            return call()
        except (httpx.TransportError, RolloutError) as error:
            if not is_passing(error) or time.monotonic() > deadline:
                raise
            failed(error)
            after = error.retry_after if isinstance(error, RolloutError) else None
            stopping.wait(min(after or PAUSE, PAUSE))
    raise Stopped

"""Retries: calls to a service that is full or is restarting are repeated until it answers."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import httpx

from rollout_service.client import RolloutError

T = TypeVar("T")

PAUSE = 1.0
"""seconds between tries, unless the service says a shorter time"""
TRANSIENT = (429, 500, 502, 503, 504, 507)
"""statuses of the service after which the same call may succeed later"""


class Stopped(Exception):
    """The call was given up because its caller is to end."""


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later."""
    return isinstance(error, httpx.TransportError) or (isinstance(error, RolloutError) and error.status in TRANSIENT)


def with_retries(
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
            if not is_transient(error) or time.monotonic() > deadline:
                raise
            failed(error)
            after = error.retry_after if isinstance(error, RolloutError) else None
            stopping.wait(min(after or PAUSE, PAUSE))
    raise Stopped

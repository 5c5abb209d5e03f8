"""Retries: a call to a service that is full or restarting is repeated until the service answers."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import httpx

from rollout_service.client import RolloutError

T = TypeVar("T")

PAUSE = 1.0
"""seconds between tries, unless the service asks for a shorter wait"""
TRANSIENT = (429, 500, 502, 503, 504, 507)
"""statuses after which the same call may succeed later"""


class Stopped(Exception):
    """The call was given up because its caller was told to end."""


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later."""
    return isinstance(error, httpx.TransportError) or (isinstance(error, RolloutError) and error.status in TRANSIENT)


def with_retries(
    call: Callable[[], T],
    seconds: float,
    stopping: threading.Event | None = None,
    failed: Callable[[Exception], None] = lambda error: None,
) -> T:
    """The answer of `call`. While its error is transient, the call is tried again, for up to `seconds`. `failed` is
    called with each transient error.

    Raises the last error, or Stopped once `stopping` is set.
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

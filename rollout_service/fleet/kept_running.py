"""Background tasks that must not end while the service runs."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

logger = logging.getLogger("rollout_service")

AGAIN_AFTER = 1.0
"""seconds between an unexpected error and the next start"""


async def kept_running(what: str, work: Callable[[], Awaitable[None]]) -> None:
    """Run `work` for ever: an error is logged with its traceback, and `work` begins again. Otherwise a task that nobody
    awaits would end in silence, and the service would only seem to work."""
    while True:
        try:
            await work()
        except Exception:
            logger.exception("%s ended with an error; it begins again", what)
            await asyncio.sleep(AGAIN_AFTER)

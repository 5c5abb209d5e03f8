"""TimedConnection: a connection of uvicorn's, closed when a request's headers do not arrive in time.

uvicorn limits the time between requests, but not the time that a request's headers take. So a client that sends a byte
a minute would hold its connection for ever.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEAD_WITHIN = 30.0
"""seconds from a connection's start, or from the first byte of a request's headers, to their end"""


class TimedConnection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._head_is_here()
        elif self.deadline is None:
            self._expect_head()

    def connection_lost(self, error: Exception | None) -> None:
        self._head_is_here()
        super().connection_lost(error)

    def _expect_head(self) -> None:
        self.deadline = self.loop.call_later(HEAD_WITHIN, self.transport.close)

    def _head_is_here(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None

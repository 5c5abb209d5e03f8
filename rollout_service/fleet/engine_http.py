"""Requests to the HTTP server in an engine's actor (engine/http_server.py), over connections that are kept."""

from collections.abc import AsyncGenerator, Mapping
from typing import NamedTuple

import aiohttp

from rollout_service.engine.http_server import KEY_HEADER

ENDLESS = aiohttp.ClientTimeout(total=None)
"""a response takes as long as it takes, and an engine that dies closes its connections"""
CONNECTION_LOST = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError)
"""what a request raises when its engine has died"""


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    """names are in lower case"""
    body: "bytes | AsyncGenerator[bytes, None]"
    """whole, or the pieces of an event stream as they arrive"""


class EngineHttp:
    def __init__(self, address: str, key: str):
        """`address`: a Unix socket's path, or `host:port`, where the server asks for `key`."""
        is_path = address.startswith("/")
        connector = aiohttp.UnixConnector(address, limit=0) if is_path else aiohttp.TCPConnector(limit=0)
        self.url = "http://engine" if is_path else f"http://{address}"
        self.streams: set[aiohttp.StreamReader] = set()
        self.session = aiohttp.ClientSession(
            connector=connector, timeout=ENDLESS, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar(),
            headers={} if is_path else {KEY_HEADER: key}, skip_auto_headers=("User-Agent", "Accept-Encoding"),
        )  # fmt: skip

    async def ask(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """The engine's answer. A stream's body must be closed. Cancelling, or closing the body, closes the connection,
        and so ends the generation. Raises CONNECTION_LOST."""
        response = await self.session.request(method, self.url + path, headers=headers, data=body)
        kept = {name.lower(): value for name, value in response.headers.items()}
        if kept.get("content-type", "").startswith("text/event-stream"):
            return Answer(response.status, kept, self._pieces(response))
        async with response:
            return Answer(response.status, kept, await response.read())

    async def _pieces(self, response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
        self.streams.add(response.content)
        try:
            async for piece in response.content.iter_any():
                yield piece
        except RuntimeError as error:  # what aiohttp raises for a read after the end of the session
            raise aiohttp.ClientConnectionError("the service is stopping") from error
        finally:
            self.streams.discard(response.content)
            response.release() if response.content.at_eof() else response.close()

    async def close(self) -> None:
        """Requests that wait for their answer, or for more of it, raise CONNECTION_LOST."""
        for stream in self.streams:  # closing the session would let some of them wait for ever
            stream.set_exception(aiohttp.ClientConnectionError("the service is stopping"))
        await self.session.close()

"""AsyncRolloutClient: RolloutClient for asyncio. Only the blocking client pushes weights, which is mostly copying."""

from collections.abc import AsyncIterator, Iterable
from typing import TypeVar

import httpx

from rollout_service.client import calls
from rollout_service.client.answers import GroupStream, error_of
from rollout_service.client.connection import Call
from rollout_service.client.methods import Methods
from rollout_service.protocol import Group, GroupRequest

T = TypeVar("T")


class AsyncRolloutClient(Methods):
    """The methods of RolloutClient, except `push_weights` and `ready`."""

    http: httpx.AsyncClient

    def opened(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(**self.options, transport=httpx.AsyncHTTPTransport(**self.route.transport))

    async def __aenter__(self) -> "AsyncRolloutClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()

    async def send(self, call: Call[T]) -> T:
        """The value of the call's answer."""
        with self.route.explained():
            answer = await self.http.request(**self.request(call))
        return call.read(answer, self.route.via)

    async def rollouts(self, groups: Iterable[GroupRequest], model: str | None = None) -> AsyncIterator[Group]:
        """The same as `RolloutClient.rollouts`."""
        requested = list(groups)
        stream, request = GroupStream(len(requested)), self.request(calls.rollouts(requested, model))
        with self.route.explained():
            async with self.http.stream(**request) as answer:
                if answer.status_code != 200:
                    await answer.aread()
                    raise error_of(answer, self.route.via)
                async for chunk in answer.aiter_bytes():
                    for group in stream.feed(chunk):
                        yield group
                for group in stream.end():
                    yield group

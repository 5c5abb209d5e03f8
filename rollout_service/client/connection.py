"""Call and Connection: what the blocking and the asyncio client share. A call is data; a client sends it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import httpx

from rollout_service.client.route import Route
from rollout_service.protocol import INTERFACE_VERSION, VERSION_HEADER

T = TypeVar("T")


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request to the service, and how its answer is read.

    Example: `Call("DELETE", "/v1/weights", check, params={"run": "a"})`
    """

    method: str
    path: str
    read: Callable[[httpx.Response, str], T]
    """called with the answer and `Route.via`; returns the answer's value, or raises RolloutError"""
    params: Mapping[str, str] | None = None
    """parameters of the query"""
    content: bytes | Iterable[bytes] | None = None
    content_type: str | None = None
    wait: float | None = None
    """seconds to wait for the answer, in place of the client's `read_timeout`"""
    connect: float | None = None
    """seconds to connect and to write, in place of the client's `timeout`"""


class Connection(ABC):
    """A connection to one service. `timeout` limits connecting and writing, and `read_timeout` limits the wait for an
    answer, in seconds. Calls that may take longer have limits of their own (calls.py). `ca_file` is the PEM file of the
    authority behind an https endpoint's certificate, if it is none of the system's. Raises EndpointError."""

    def __init__(
        self,
        endpoint: str,
        token: str | None = None,
        timeout: float = 30.0,
        read_timeout: float = 60.0,
        ca_file: Path | None = None,
    ):
        self.timeout, self.read_timeout, self.route = timeout, read_timeout, Route(endpoint, ca_file)
        headers = {VERSION_HEADER: str(INTERFACE_VERSION)} | ({"Authorization": f"Bearer {token}"} if token else {})
        self.options: dict[str, Any] = {
            "base_url": endpoint,
            "headers": headers,
            "timeout": httpx.Timeout(timeout, read=read_timeout),
        }
        """arguments of httpx's client"""
        self.http: Any = self.opened()

    @abstractmethod
    def opened(self) -> Any:
        """httpx's client, blocking or not."""

    def request(self, call: Call[Any]) -> dict[str, Any]:
        """Arguments of httpx's `request` and `stream`."""
        return {
            "method": call.method,
            "url": call.path,
            "params": call.params,
            "content": call.content,
            "headers": {"Content-Type": call.content_type} if call.content_type else None,
            "timeout": httpx.Timeout(call.connect or self.timeout, read=call.wait or self.read_timeout),
        }

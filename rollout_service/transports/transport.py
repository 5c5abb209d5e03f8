"""Transport: a way to get a version's bytes from a trainer to the service. Both of its ends are in one file.

    trainer                          POST /v1/weights/{of}                       service
    Sender.send(of, parts) --------> the manifest, and the bytes or ----------> Receiver.adopt(of, body)
      gives what to put there        what says where they are                     gives a file of its own

- The manifest is the same for all transports. The query has the version, its run and the checksum of its bytes. The
  bytes are a safetensors file, whose header has the tensors by name, shape and dtype.
- The body's content type says which transport it is.
- A sender's context lasts until the service has answered. Then the sender may take back what it lent.
- What a receiver returns is complete and belongs to the service. Nothing that the trainer does later changes it.
"""

from collections.abc import AsyncIterable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rollout_service.protocol import Problem, WeightsOf


class Sent(NamedTuple):
    """What a transport puts into the request of a push."""

    content: bytes | Iterable[bytes]
    """the request's body"""
    content_type: str
    checksum: str
    """BLAKE3 of the safetensors bytes"""


class Sender(Protocol):
    """The trainer's end."""

    def send(self, of: WeightsOf, parts: Sequence[memoryview]) -> AbstractContextManager[Sent]:
        """`parts` are the safetensors bytes (`tensor_bytes.safetensors_parts`)."""


class Update(NamedTuple):
    """A version that has arrived, and that no engine holds yet."""

    file: Path
    """safetensors, in the service's shared-memory folder"""
    checksum: str
    """the BLAKE3 that the file's bytes must have"""


class Receiver(Protocol):
    """The service's end."""

    async def adopt(self, of: WeightsOf, body: AsyncIterable[bytes], checksum: str | None, limit: int) -> Update:
        """`checksum` is the sender's, if it sent one. `limit` is the most bytes that the tensors can need. Raises
        RefusedUpdate; then nothing is left of the update."""


class RefusedUpdate(ValueError):
    """An update that no engine loaded, and what is wrong with it. `status` is the HTTP status of the answer."""

    def __init__(self, message: str, problems: list[Problem], status: int = 400):
        super().__init__(message)
        self.problems, self.status = problems, status

    def __reduce__(self) -> tuple[Any, ...]:
        # An engine may raise it too, and an exception is pickled with what its base class was given.
        return type(self), (str(self), self.problems, self.status)


def refused(field: str, message: str, status: int = 400) -> RefusedUpdate:
    """The RefusedUpdate for one thing that is wrong."""
    return RefusedUpdate(message, [Problem(field=field, message=message)], status)


def check_received(received: str, sent: str | None) -> None:
    """Raises RefusedUpdate when bytes with the checksum `received` are not the sender's."""
    if sent is not None and received != sent:
        message = f"the received bytes have the BLAKE3 {received}, but the sender's have {sent}; push again"
        raise refused("checksum", message)

"""Loading of a weight version into an engine: where its bytes are, and what the engine says once it has read them.

Engines on the front's node read the file that the service received. Its bytes are put into Ray's object store once an
engine on another node needs them, which may be long after the push: a node joins, or the front has started again.
"""

import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rollout_service.tensor_bytes import part_checksums
from rollout_service.transports import Update
from rollout_service.transports.folder import SHARED_MEMORY


class Versions(NamedTuple):
    """The versions that an engine holds."""

    policy: int
    drafter: int


class WeightsFile(NamedTuple):
    """Where a version's safetensors bytes are: a file on node `node`, and an object in Ray's store for other nodes."""

    version: int
    path: str
    checksum: str
    node: str
    bytes: Any  # ray.ObjectRef of a numpy array; None while every engine is on `node`
    parts: tuple[str, ...] = ()
    """checksums of equal parts of the bytes, one for each rank of an engine that has several"""

    def for_nodes(self, nodes: Iterable[str]) -> "WeightsFile":
        """The same, so that engines on these nodes can read it. Must be called on `node`."""
        if self.bytes is not None or all(node == self.node for node in nodes):
            return self
        import ray

        return self._replace(bytes=ray.put(np.fromfile(self.path, dtype=np.uint8)))


def locate(version: int, update: Update, ranks: int, nodes: Iterable[str]) -> WeightsFile:
    """Where an update is, whose file is on this node. `ranks`: of each engine; `nodes`: of the engines."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    parts = tuple(part_checksums(update.file, ranks)) if ranks > 1 else ()
    return WeightsFile(version, str(update.file), update.checksum, here, None, parts).for_nodes(nodes)


@asynccontextmanager
async def on_this_node(weights: WeightsFile) -> AsyncIterator[Path]:
    """The bytes as a file on this node: the update's own file, or a copy for as long as the context lasts."""
    import ray

    if ray.get_runtime_context().get_node_id() == weights.node:
        yield Path(weights.path)
        return
    copy = SHARED_MEMORY / f"rollout-service-{uuid.uuid4().hex}.safetensors"
    try:
        copy.write_bytes((await weights.bytes).data)
        yield copy
    finally:
        copy.unlink(missing_ok=True)


class Loaded(NamedTuple):
    """What an engine reports about an update that it loaded."""

    pause: float
    """seconds from the pause to the resumption of generation"""
    changed: int
    """modules that hold something else than before"""
    modules: int
    """all modules of the model"""


class DifferentBytes(RuntimeError):
    """An engine read other bytes of a version than were sent, and still holds what it held before."""


class HalfLoaded(RuntimeError):
    """Some ranks of an engine read other bytes than were sent, and the others loaded theirs. The engine must not
    serve."""


def check_all_ranks(received: list[str], sent: str) -> None:
    """`received` are the checksums of the bytes that an engine's ranks read. A rank whose checksum is not `sent` has
    loaded nothing. Raises DifferentBytes when that is so of every rank, and HalfLoaded when it is so of some."""
    different = [checksum for checksum in received if checksum != sent]
    if different:
        error = DifferentBytes if len(different) == len(received) else HalfLoaded
        count = f" on {len(different)} of {len(received)} ranks" if len(received) > 1 else ""
        raise error(f"read bytes with the BLAKE3 {different[0]}{count}, but the sender's have {sent}")


def check_all_parts(received: list[str], sent: Sequence[str]) -> None:
    """`received` are the checksums of the parts that an engine's ranks read, by rank. Raises DifferentBytes if one is
    another than was sent."""
    for rank, checksum in enumerate(received):
        check_all_ranks([checksum], sent[rank % len(sent)])

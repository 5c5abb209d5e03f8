"""/v1/weights: the versions in service, and pushes of new ones."""

from pydantic import Field

from rollout_service.protocol.wire_type import WireType


class WeightStatus(WireType):
    """One set of weights, as every engine holds it."""

    version: int
    """0 for the checkpoint that the service started with; the number only grows"""
    tensors: int
    bytes: int
    checksum: str
    """BLAKE3 of the pushed safetensors bytes; empty for version 0"""
    seconds: float = 0.0
    """seconds from receiving the bytes to publishing the version"""
    pause: float = 0.0
    """the longest part of these seconds in which an engine did not generate"""
    run: str | None = None
    """the run that the weights belong to, which others replace only if they take over; None if they belong to no run"""
    skipped: bool = False
    """only in the answer to a push: a newer version came before this one was loaded; the other fields describe the
    version in service"""


class WeightsStatus(WireType):
    policy: WeightStatus
    drafter: WeightStatus | None
    """None if the drafter has no weights of its own"""
    dtype: str
    """the floating-point dtype that pushed tensors must have, e.g. float32"""
    shared_memory: str
    """folder for pushes from the same machine; a client that can read the file `token` in it may push through it"""


class SharedMemoryPush(WireType):
    """A push by reference: the file `file` in the service's shared-memory folder has the tensors."""

    file: str = Field(pattern=r"^push-[A-Za-z0-9_-]+\.safetensors$")
    """its name begins with `push-`; the service takes the file away"""

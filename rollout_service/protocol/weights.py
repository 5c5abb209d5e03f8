"""/v1/weights: the versions in service, and pushes of new ones."""

from pydantic import Field

from rollout_service.protocol.wire_type import WireType


class WeightStatus(WireType):
    """One set of weights as every engine holds it."""

    version: int
    """0 for the checkpoint the service started with; only grows"""
    tensors: int
    bytes: int
    checksum: str
    """BLAKE3 of the pushed safetensors bytes; empty for version 0"""
    seconds: float = 0.0
    """from the received bytes to the version's publication"""
    pause: float = 0.0
    """of these, the longest time that an engine did not generate"""
    run: str | None = None
    """the run that the weights belong to: no other replaces them unless it takes over; None when they are nobody's"""
    skipped: bool = False
    """answer to a push alone: a newer version came before this one was loaded; the status is of what is in service"""


class WeightsStatus(WireType):
    policy: WeightStatus
    drafter: WeightStatus | None
    """None when the drafter has no tensors of its own"""
    dtype: str
    """the floating-point dtype that pushed tensors must have, e.g. float32"""
    shared_memory: str
    """folder for pushes from the same machine; holds a file `token` that a local client must read"""


class SharedMemoryPush(WireType):
    """A push by reference: `file` lies in the service's shared-memory folder."""

    file: str = Field(pattern=r"^[A-Za-z0-9_-]+\.safetensors$")

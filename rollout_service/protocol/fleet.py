"""POST and GET /v1/fleet/engines: the engines, and their number."""

from typing import Annotated, Literal

from pydantic import Field

from rollout_service.protocol.wire_type import WireType

MAX_ENGINES = 4096
FLEET_PATH = "/v1/fleet/engines"


class ScaleEngines(WireType):
    """Example: `{"engines": 4}`"""

    engines: Annotated[int, Field(ge=1, le=MAX_ENGINES)] | Literal["all"]
    """number of engines; all: as many as fit, now and when nodes join or leave"""
    drain: float = Field(default=60.0, ge=0.0, le=86400.0, allow_inf_nan=False)
    """seconds that an engine that is taken away has for what it runs; its groups are then generated elsewhere"""


EngineState = Literal["in service", "starting", "draining"]


class EngineStatus(WireType):
    index: int
    state: EngineState
    """starting: also after a death; draining: it takes no new requests and then ends"""
    requests: int
    """completions under way, and requests to vLLM's routes"""
    tokens_in_flight: int
    """of their prompts, and those that may still be generated"""
    restarts: int
    node: str
    """Ray's id of its node; empty before its first start"""


class FleetStatus(WireType):
    wanted: int | Literal["all"]
    """the number that was asked for last"""
    engines: list[EngineStatus]
    """by index"""

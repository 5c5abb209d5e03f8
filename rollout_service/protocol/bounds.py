"""Bounds and numbers that requests and configurations share: what the engine takes, no more."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from rollout_service.endpoint import checked_endpoint

MAX_GROUPS = 4096
MAX_COMPLETIONS = 512
MIN_TEMPERATURE = 0.01
"""vLLM raises what lies between 0 and this to this, and what was sampled would not be what was asked for"""
MAX_TEMPERATURE = 2.0
"""vLLM's own bound"""
MAX_INT32 = 2**31 - 1
"""what the engine's integers hold"""
LONGEST_RUN = 256
"""characters of a run's name"""
MAX_VERSION = 2**53 - 1
"""what every reader of JSON holds exactly; the queue's database holds more, sums of two included"""

Endpoint = Annotated[str, AfterValidator(checked_endpoint)]
"""URL of a service, e.g. http://127.0.0.1:8000 or http://[::1]:8000"""
WeightsOf = Literal["policy", "drafter"]
Version = Annotated[int, Field(ge=0, le=MAX_VERSION)]
"""a weight version, or a number of them"""
TokenId = Annotated[int, Field(ge=0, le=MAX_INT32)]


def sampled_otherwise(temperature: float) -> str | None:
    """What is wrong with a temperature that vLLM would raise; None for all others."""
    if 0.0 < temperature < MIN_TEMPERATURE:
        return f"{temperature:g} is sampled as {MIN_TEMPERATURE}: give that, or 0 for the best token"
    return None


def as_sampled(temperature: float) -> float:
    if message := sampled_otherwise(temperature):
        raise ValueError(message)
    return temperature


Temperature = Annotated[
    float,
    Field(
        ge=0.0, le=MAX_TEMPERATURE, allow_inf_nan=False,
        json_schema_extra={"anyOf": [{"const": 0.0}, {"minimum": MIN_TEMPERATURE}]},
    ),
    AfterValidator(as_sampled),
]  # fmt: skip
TopP = Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)]
TopK = Annotated[int, Field(ge=0, le=MAX_INT32)]
ResponseTokens = Annotated[int, Field(ge=1, le=MAX_INT32)]
"""what the engine takes, in requests and in the configurations that requests are made of"""

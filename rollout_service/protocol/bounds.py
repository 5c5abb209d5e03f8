"""Bounds that requests and configurations share: they allow what the engine takes, and no more."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from rollout_service.endpoint import checked_endpoint

MAX_GROUPS = 4096
MAX_COMPLETIONS = 512
MIN_TEMPERATURE = 0.01
"""vLLM raises a temperature between 0 and this to this, so tokens would not be sampled as the request asked"""
MAX_TEMPERATURE = 2.0
"""vLLM's own bound"""
MAX_INT32 = 2**31 - 1
"""the largest integer that the engine holds"""
LONGEST_RUN = 256
"""characters of a run's name"""
LONGEST_SESSION = 256
"""characters of a conversation's name"""
MAX_VERSION = 2**53 - 1
"""the largest integer that every reader of JSON holds exactly; the queue's database holds the sum of two as well"""

Endpoint = Annotated[str, AfterValidator(checked_endpoint)]
"""URL of a service, e.g. http://127.0.0.1:8000 or http://[::1]:8000"""
WeightsOf = Literal["policy", "drafter"]
Version = Annotated[int, Field(ge=0, le=MAX_VERSION)]
"""a weight version, or a difference of two"""
TokenId = Annotated[int, Field(ge=0, le=MAX_INT32)]


def sampled_otherwise(temperature: float) -> str | None:
    """The error for a temperature that vLLM would raise; None for every other temperature."""
    if 0.0 < temperature < MIN_TEMPERATURE:
        least = f"{MIN_TEMPERATURE} is the least that the engine samples with"
        return f"{temperature:g} is too low: {least}; give that or more, or 0 for the most likely token"
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
"""length of a response, in requests and in the configurations from which requests are made"""

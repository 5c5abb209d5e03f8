"""POST /v1/rollouts: prompts in, finished groups out."""

import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StringConstraints, field_validator, model_validator

from rollout_service.lossless import not_lossless
from rollout_service.protocol.bounds import (
    MAX_COMPLETIONS,
    MAX_GROUPS,
    MAX_INT32,
    ResponseTokens,
    Temperature,
    TokenId,
    TopK,
    TopP,
)
from rollout_service.protocol.wire_type import WireType


class Sampling(WireType):
    """How tokens are drawn. Only what speculation keeps lossless can be asked for."""

    temperature: Temperature = 1.0
    """0 takes the most likely token; else 0.01 or more, as the engine has it"""
    top_p: TopP = 1.0
    """smallest set of tokens whose probabilities reach this"""
    top_k: TopK = 0
    """the k most likely tokens; 0 for all"""
    max_tokens: ResponseTokens = 256
    """longest response, in tokens"""
    min_tokens: int = Field(default=0, ge=0, le=MAX_INT32)
    """no end of sequence before this many tokens"""
    stop: list[Annotated[str, StringConstraints(min_length=1)]] = Field(default_factory=list, max_length=16)
    """strings that end a response"""
    ignore_eos: bool = False
    """go on to max_tokens past the end of sequence (fixed lengths)"""
    seed: int | None = Field(default=None, ge=0, lt=2**31)
    """completion i of a group draws with seed + i; the sample path also depends on the drafter"""

    @model_validator(mode="before")
    @classmethod
    def lossless(cls, data: Any) -> Any:
        for name, message in not_lossless(data, "rollouts") if isinstance(data, dict) else ():
            raise ValueError(f"{name} {message}")
        return data


class Message(WireType):
    role: str
    content: str


PROMPTS = "prompt", "prompt_token_ids", "messages"
"""fields of a group, of which exactly one is given"""


class GroupRequest(WireType):
    """One prompt, as text, token ids or chat messages, and how many completions of it.

    Example: `{"prompt": "2 + 2 =", "n": 8, "sampling": {"temperature": 1.0, "max_tokens": 64}}`
    """

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": [name], "properties": {name: {"not": {"type": "null"}}}} for name in PROMPTS]
        }
    )

    id: str | None = Field(default=None, max_length=256)
    """the client's own name for the group; comes back with it. Without one it is the group's index in the request, with
    underscores behind it where another group has that name"""
    prompt: str | None = None
    prompt_token_ids: list[TokenId] | None = Field(default=None, min_length=1)
    messages: list[Message] | None = Field(default=None, min_length=1)
    n: int = Field(default=1, ge=1, le=MAX_COMPLETIONS)
    """completions"""
    sampling: Sampling = Field(default_factory=Sampling)
    draft_steps: bool = False
    """let each completion's speculation record hold every step (`steps`)"""
    metadata: dict[str, Any] = Field(default_factory=dict)
    """comes back with the group, untouched"""

    @model_validator(mode="after")
    def one_prompt(self) -> "GroupRequest":
        if sum(getattr(self, name) is not None for name in PROMPTS) != 1:
            raise ValueError(f"give exactly one of {', '.join(PROMPTS)}")
        return self

    @model_validator(mode="after")
    def one_greedy_completion(self) -> "GroupRequest":
        if self.sampling.temperature == 0.0 and self.n > 1:
            raise ValueError(f"n is {self.n} at temperature 0, where all completions are the same: give n = 1")
        return self

    @field_validator("metadata")
    @classmethod
    def comes_back(cls, metadata: dict[str, Any]) -> dict[str, Any]:
        """What JSON cannot hold would come back as another value: an infinity that 1e400 became, a lone surrogate."""
        try:
            json.dumps(metadata, ensure_ascii=False, allow_nan=False).encode()
        except ValueError as error:
            raise ValueError(f"cannot be written as JSON again: {error}") from None
        return metadata


class RolloutRequest(WireType):
    groups: list[GroupRequest] = Field(min_length=1, max_length=MAX_GROUPS)
    model: str | None = None
    """the served policy's name; checked when given"""


class WeightSpan(WireType):
    """Tokens [start, end) of a completion were sampled by policy version `version`."""

    version: int
    start: int
    end: int


class Speculation(WireType):
    """One completion's speculation record. Ratios are of sums over many of these, never means of ratios.

    Example: 10 steps of 3 drafts, 4 of which accepted none, 6 all:
    `{"draft_steps": 10, "drafted": 30, "accepted": 18, "accepted_histogram": [4, 0, 0, 6], ...}`
    """

    drafter: str
    drafter_version: int
    draft_steps: int
    drafted: int
    accepted: int
    accepted_histogram: list[int]
    """steps by the number of accepted drafts, 0 to k"""
    steps: list[tuple[int, int]] | None = None
    """(drafted, accepted) of every step in order, those without drafts as (0, 0), when asked for: a step yields its
    accepted drafts and one more token, the last one may be cut by the response's end"""


class Completion(WireType):
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[float]
    """of each token under the distribution it was drawn from (after temperature, top-k, top-p), in nats; at temperature
    0, where that is certain, under the one of temperature 1"""
    weight_versions: list[WeightSpan]
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None = None
    """the stop string or token that ended the response; None for the end of sequence"""
    speculation: Speculation | None = None
    """None when no drafter is on"""


class Group(WireType):
    """A finished group: one line of the answer of POST /v1/rollouts."""

    id: str
    prompt_token_ids: list[int]
    completions: list[Completion]
    sampling: Sampling
    """what it was drawn with: the request's, and the service's own defaults for what that left out"""
    engine: int
    """index of the engine that generated it"""
    metadata: dict[str, Any] = Field(default_factory=dict)

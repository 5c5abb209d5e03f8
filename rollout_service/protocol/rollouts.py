"""POST /v1/rollouts: prompts in, finished groups out."""

import base64
import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, StringConstraints, field_validator, model_validator

from rollout_service.lossless import not_lossless
from rollout_service.protocol.bounds import (
    LONGEST_SESSION,
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

if TYPE_CHECKING:
    import numpy as np


class Sampling(WireType):
    """How tokens are sampled. It has only parameters that speculation keeps lossless."""

    temperature: Temperature = 1.0
    """0 takes the most likely token; any other value must be 0.01 or more, the least that the engine samples with"""
    top_p: TopP = 1.0
    """sample from the smallest set of tokens whose probabilities add up to this"""
    top_k: TopK = 0
    """sample from the k most likely tokens; 0 for all"""
    max_tokens: ResponseTokens = 256
    """longest response, in tokens"""
    min_tokens: int = Field(default=0, ge=0, le=MAX_INT32)
    """the end of sequence is not sampled before this many tokens"""
    stop: list[Annotated[str, StringConstraints(min_length=1)]] = Field(default_factory=list, max_length=16)
    """strings that end a response"""
    ignore_eos: bool = False
    """continue past the end of sequence up to max_tokens, for responses of a fixed length"""
    seed: int | None = Field(default=None, ge=0, lt=2**31)
    """completion i of a group uses seed + i; which tokens are sampled depends on the drafter too"""

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
"""fields of a group; exactly one of them is given"""


class GroupRequest(WireType):
    """One prompt, as text, token ids or chat messages, and the number of its completions.

    Example: `{"prompt": "2 + 2 =", "n": 8, "sampling": {"temperature": 1.0, "max_tokens": 64}}`
    """

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": [name], "properties": {name: {"not": {"type": "null"}}}} for name in PROMPTS]
        }
    )

    id: str | None = Field(default=None, max_length=256)
    """the client's own name for the group, returned with it. When not given, it is the group's index in the request,
    followed by underscores if another group has that name"""
    prompt: str | None = None
    prompt_token_ids: list[TokenId] | None = Field(default=None, min_length=1)
    messages: list[Message] | None = Field(default=None, min_length=1)
    n: int = Field(default=1, ge=1, le=MAX_COMPLETIONS)
    """number of completions"""
    sampling: Sampling = Field(default_factory=Sampling)
    session: str | None = Field(default=None, min_length=1, max_length=LONGEST_SESSION)
    """name of a conversation: its groups go to the engine that has the keys and values of their common prefix"""
    draft_steps: bool = False
    """whether each completion's speculation record lists every step (`steps`)"""
    routed_experts: bool = False
    """whether each completion has the experts that the policy's routers chose; needs `engine.routed_experts`"""
    metadata: dict[str, Any] = Field(default_factory=dict)
    """returned with the group, unchanged"""

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
        """Refuses a value that JSON cannot hold, because it would come back as another one: an infinity (from 1e400),
        or a lone surrogate."""
        try:
            json.dumps(metadata, ensure_ascii=False, allow_nan=False).encode()
        except ValueError as error:
            raise ValueError(f"cannot be returned as JSON: {error}") from None
        return metadata


class RolloutRequest(WireType):
    groups: list[GroupRequest] = Field(min_length=1, max_length=MAX_GROUPS)
    model: str | None = None
    """the served policy's name; when given, any other name is refused"""


class WeightSpan(WireType):
    """Tokens [start, end) of a completion were sampled by policy version `version`."""

    version: int
    start: int
    end: int


class Speculation(WireType):
    """One completion's speculation record. Compute a ratio from sums over many records, never as a mean of ratios.

    Example: 10 steps of 3 drafts each, of which 4 steps accepted none and 6 steps accepted all:
    `{"draft_steps": 10, "drafted": 30, "accepted": 18, "accepted_histogram": [4, 0, 0, 6], ...}`
    """

    drafter: str
    """kind of the drafter"""
    drafter_version: int
    draft_steps: int
    """steps that had drafts"""
    drafted: int
    """tokens that were drafted in these steps"""
    accepted: int
    """drafted tokens that were accepted"""
    accepted_histogram: list[int]
    """number of steps by accepted drafts, from 0 to k"""
    steps: list[tuple[int, int]] | None = None
    """(drafted, accepted) of every step in order, with (0, 0) for a step without drafts; only when the request asks for
    it. A step yields its accepted drafts and one more token. The end of the response may cut the last step short"""


class RoutedExperts(WireType):
    """The experts that the policy's routers chose for the tokens of prompt and response.

    The last token of the response has none: the engine sampled it, and did not read it. Layers without experts have
    zeros.
    """

    shape: tuple[int, int, int]
    """tokens (one less than prompt and response have), layers of the policy, active experts of a token"""
    dtype: Literal["uint8", "uint16"]
    data: str
    """base64 of the numbers of the experts, in the order of the shape, little-endian"""

    @classmethod
    def of(cls, experts_TLK: "np.ndarray") -> "RoutedExperts":
        little = experts_TLK.astype(experts_TLK.dtype.newbyteorder("<"))
        name: Any = experts_TLK.dtype.name
        return cls(shape=experts_TLK.shape, dtype=name, data=base64.b64encode(little.tobytes()).decode())

    def array(self) -> "np.ndarray":
        """The experts as integers (T, L, K) of `dtype`. Raises ValueError when the data does not fit the shape."""
        import numpy as np

        numbers = np.frombuffer(base64.b64decode(self.data), np.dtype(self.dtype).newbyteorder("<"))
        return numbers.reshape(self.shape)


class Completion(WireType):
    """One response to the prompt of a group."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[float]
    """log-probability of each token, in nats, under the distribution that it was sampled from (after temperature, top-k
    and top-p). At temperature 0, where the token is certain, it is the log-probability at temperature 1"""
    weight_versions: list[WeightSpan]
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None = None
    """the stop string or token that ended the response; None if the end of sequence or the length limit ended it"""
    speculation: Speculation | None = None
    """None when no drafter is on"""
    routed_experts: RoutedExperts | None = None
    """only when the request asks for it"""


class Group(WireType):
    """A finished group: one line of the answer of POST /v1/rollouts."""

    id: str
    prompt_token_ids: list[int]
    completions: list[Completion]
    sampling: Sampling
    """the parameters that were used: those of the request, and the service's defaults for the others"""
    engine: int
    """index of the engine that generated it"""
    metadata: dict[str, Any] = Field(default_factory=dict)

"""RolloutRecord: what RL needs to know of a choice that vLLM's own routes generated."""

from rollout_service.protocol.rollouts import Speculation, WeightSpan
from rollout_service.protocol.wire_type import WireType

RECORD = "rollout_record"
"""field of each choice of an answer"""
RETURN_RECORD = "return_rollout_record"
"""field of a request that asks for it"""


class RolloutRecord(WireType):
    """Field `rollout_record` of each choice of POST /v1/completions, /v1/chat/completions and /inference/v1/generate,
    if the request says `return_rollout_record: true`. In a stream it comes with the choice's last chunk."""

    prompt_token_ids: list[int]
    """what the policy was given, token for token"""
    token_ids: list[int]
    """what it sampled, also what the choice's text leaves out: the end of sequence, and a stop string"""
    logprobs: list[float]
    """log-probability of each token of `token_ids`, in nats, under the distribution that it was sampled from (after
    temperature, top-k and top-p), whether or not the request asks for log-probabilities"""
    weight_versions: list[WeightSpan]
    speculation: Speculation | None = None
    """None when no drafter is on"""
    engine: int
    """index of the engine that generated it"""

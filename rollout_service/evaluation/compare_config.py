"""CompareConfig: the grid of drafters, draft lengths and concurrencies, and what is generated in each cell."""

from itertools import product
from pathlib import Path

from pydantic import Field, FilePath, PositiveInt, model_validator

from drafters.drafter import DraftSampling, VerificationChoice
from drafters.registry import DrafterConfig, make_drafter
from drafters.settings import Section
from rollout_service.bearer_token import WithToken
from rollout_service.config import EngineConfig, ServiceConfig
from rollout_service.protocol import Endpoint, Temperature, TopK, TopP


class ComparedDrafter(Section):
    """One drafter of the comparison, with each of these draft lengths and ways of drawing drafts."""

    kind: str
    """one of the kinds in drafters/registry.py"""
    model: str | None = None
    """folder or Hugging Face name of its checkpoint"""
    draft_tokens: list[PositiveInt] = Field(default_factory=list)
    """draft lengths; the comparison's own when not given"""
    draft_sampling: list[DraftSampling] = Field(default=["probabilistic"], min_length=1)
    """probabilistic, greedy, or both for the difference in acceptance"""
    verification: list[VerificationChoice] = Field(default=["auto"], min_length=1)
    """auto, standard, block, or several for the difference in acceptance"""


class CompareConfig(WithToken, Section):
    """Compare drafters on one policy: acceptance, speed relative to no drafter, and losslessness, side by side."""

    model: str
    """the policy: a folder or a Hugging Face name"""
    engine: EngineConfig = EngineConfig()
    drafters: list[ComparedDrafter] = Field(default_factory=list)
    """`none` is always measured too: it is what speed is relative to"""
    draft_tokens: list[PositiveInt] = Field(default=[3], min_length=1)
    """draft lengths (k) of every drafter that names none itself"""
    concurrency: list[PositiveInt] = Field(default=[16], min_length=1)
    """completions under way at the same time"""
    prompts: FilePath
    """JSON lines with `prompt`, `messages` or `prompt_token_ids`"""
    response_tokens: int = Field(default=64, ge=1)
    """length of every response: the end of sequence does not end it, so that all arms do the same work"""
    tokens: int = Field(default=20_000, ge=1)
    """at least this many tokens a row"""
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    rounds: int = Field(default=4, ge=1)
    """a row is measured in this many turns, drafters alternating, so that a noisy moment hits all alike"""
    engines_at_once: int = Field(default=0, ge=0)
    """engines kept in memory together, and so alternating; 0: all on a CPU, one on a GPU"""
    seed: int = 0
    """of the sampling: response i of every row has the same"""
    endpoint: Endpoint | None = None
    """measure this running service (one row a concurrency) instead of starting engines; what engines and drafters are
    configured with is then not read"""
    output: Path = Path("report/compare")
    """folder of compare.json, compare.md and the plots"""

    @model_validator(mode="after")
    def known_drafters(self) -> "CompareConfig":
        for drafter in self.arms():
            make_drafter(drafter).speculative_config()
        return self

    def arms(self) -> list[DrafterConfig]:
        """One drafter configuration an engine, `none` first; ways of drawing drafts share an engine."""
        arms = [DrafterConfig()]
        for drafter in self.drafters:
            if drafter.kind != "none":
                arms += [
                    DrafterConfig(kind=drafter.kind, model=drafter.model, draft_tokens=k, schedule="fixed")
                    for k in drafter.draft_tokens or self.draft_tokens
                ]
        return arms

    def ways(self, arm: DrafterConfig) -> list[DrafterConfig]:
        """The arm's drafter with each way of drawing and verifying drafts that is to be measured on its engine."""
        for drafter in self.drafters:
            if (drafter.kind, drafter.model) == (arm.kind, arm.model):
                samplings = drafter.draft_sampling if make_drafter(arm).samples else ["greedy"]  # deterministic drafts
                ways = [
                    (sampling, verification)
                    for sampling, verification in product(samplings, drafter.verification)
                    # Of deterministic drafts both verifications make the same decisions.
                    if sampling == "probabilistic" or verification == drafter.verification[0]
                ]
                return [arm.model_copy(update={"draft_sampling": s, "verification": v}) for s, v in ways]
        return [arm]

    def service(self, arm: DrafterConfig) -> ServiceConfig:
        return ServiceConfig(model=self.model, engine=self.engine, drafter=arm)

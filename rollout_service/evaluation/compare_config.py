"""CompareConfig: the grid of drafters, draft lengths and concurrencies, and what is generated in each cell."""

from itertools import product
from pathlib import Path

from pydantic import Field, PositiveInt, model_validator

from drafters.drafter import DraftSampling, VerificationChoice
from drafters.registry import DrafterConfig, make_drafter
from drafters.runners import Runner
from drafters.settings import ExistingFile, Section
from rollout_service.bearer_token import WithToken
from rollout_service.certificates import WithAuthority
from rollout_service.config import EngineConfig, ServiceConfig
from rollout_service.engine.switches import started_as
from rollout_service.evaluation.recomputation_config import RecomputationConfig
from rollout_service.protocol import Endpoint, Temperature, TopK, TopP


class ComparedDrafter(Section):
    """One drafter of the comparison, with each of its draft lengths and ways to sample and verify drafts."""

    kind: str
    """one of the kinds in drafters/registry.py"""
    model: str | None = None
    """folder or Hugging Face name of its checkpoint"""
    draft_tokens: list[PositiveInt] = Field(default_factory=list)
    """draft lengths; when not given, those of the comparison"""
    draft_sampling: list[DraftSampling] = Field(default=["probabilistic"], min_length=1)
    """probabilistic, greedy, or both to compare their acceptance"""
    verification: list[VerificationChoice] = Field(default=["auto"], min_length=1)
    """auto, standard, block, or several to compare their acceptance"""


class CompareConfig(WithToken, WithAuthority, Section):
    """Compare drafters on one policy: acceptance, speed relative to no drafter, and losslessness, side by side."""

    model: str
    """the policy: a folder or a Hugging Face name"""
    engine: EngineConfig = EngineConfig()
    recomputation: RecomputationConfig = RecomputationConfig()
    drafters: list[ComparedDrafter] = Field(default_factory=list)
    """`none` is always measured too, because speed is relative to it"""
    draft_tokens: list[PositiveInt] = Field(default=[3], min_length=1)
    """draft lengths (k) of every drafter that gives none itself"""
    concurrency: list[PositiveInt] = Field(default=[16], min_length=1)
    """numbers of completions that run at the same time"""
    prompts: ExistingFile
    """JSON lines with `prompt`, `messages` or `prompt_token_ids`"""
    response_tokens: int = Field(default=64, ge=1)
    """length of every response; the end of sequence does not end it, so that all rows do the same work"""
    tokens: int = Field(default=20_000, ge=1)
    """sample at least this many tokens in each row"""
    temperature: Temperature = 1.0
    """temperature in every row"""
    top_p: TopP = 1.0
    """top-p in every row; 1 keeps all tokens"""
    top_k: TopK = 0
    """top-k in every row; 0 keeps all tokens"""
    rounds: int = Field(default=4, ge=1)
    """rounds of measurement; all rows take turns in each, so that a slow moment of the machine hits all alike"""
    engines_at_once: int = Field(default=0, ge=0)
    """engines that are kept in memory together and take turns; 0: all on a CPU, one on a GPU"""
    seed: int = 0
    """seed of the sampling; response i has the same seed in every row"""
    endpoint: Endpoint | None = None
    """measure this running service, one row for each concurrency, instead of starting engines; the settings of engines
    and drafters are then not read"""
    output: Path = Path("report/compare")
    """folder for compare.json, costs.json, compare.md and the plots"""

    @model_validator(mode="after")
    def known_drafters(self) -> "CompareConfig":
        for drafter in self.arms():
            make_drafter(drafter).speculative_config()
        return self

    def arms(self, runner: Runner = "v1") -> list[DrafterConfig]:
        """One drafter configuration for each engine start, `none` first. Ways to sample and verify drafts share an
        engine if it can be switched between them."""
        arms = [DrafterConfig()]
        for drafter in self.drafters:
            if drafter.kind != "none":
                for k in drafter.draft_tokens or self.draft_tokens:
                    plain = DrafterConfig(kind=drafter.kind, model=drafter.model, draft_tokens=k, schedule="fixed")
                    arms += [started_as(way, runner) for way in self._all_ways(plain)]
        return [arm for i, arm in enumerate(arms) if arm not in arms[:i]]

    def ways(self, arm: DrafterConfig, runner: Runner = "v1") -> list[DrafterConfig]:
        """The arm's drafter with each way to sample and verify drafts that is measured on its engine."""
        return [way for way in self._all_ways(arm) if started_as(way, runner) == arm]

    def _all_ways(self, arm: DrafterConfig) -> list[DrafterConfig]:
        for drafter in self.drafters:
            if (drafter.kind, drafter.model) == (arm.kind, arm.model):
                samplings = drafter.draft_sampling if make_drafter(arm).samples else ["greedy"]  # deterministic drafts
                ways = [
                    (sampling, verification)
                    for sampling, verification in product(samplings, drafter.verification)
                    # Both verifications make the same decisions about deterministic drafts.
                    if sampling == "probabilistic" or verification == drafter.verification[0]
                ]
                return [arm.model_copy(update={"draft_sampling": s, "verification": v}) for s, v in ways]
        return [arm]

    def service(self, arm: DrafterConfig) -> ServiceConfig:
        return ServiceConfig(model=self.model, engine=self.engine, drafter=arm)

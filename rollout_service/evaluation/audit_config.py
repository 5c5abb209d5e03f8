"""AuditConfig: the grid of settings that are tested for losslessness, and the rows that cover it."""

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from allpairspy import AllPairs
from pydantic import Field, model_validator

from drafters.drafter import DraftSampling, VerificationChoice
from drafters.registry import DrafterConfig, make_drafter
from drafters.settings import ExistingFile, Section
from rollout_service.bearer_token import WithToken
from rollout_service.certificates import WithAuthority
from rollout_service.config import EngineConfig, ServiceConfig
from rollout_service.evaluation.cut import Cut
from rollout_service.evaluation.recomputation_config import RecomputationConfig
from rollout_service.protocol import Endpoint, Temperature, TopK, TopP


class AuditedDrafter(Section):
    """One drafter of the grid."""

    kind: str
    """one of the kinds in drafters/registry.py; "none" is one of them"""
    model: str | None = None
    """folder or Hugging Face name of its checkpoint"""
    draft_tokens: int = Field(default=3, ge=1, le=16)
    """tokens drafted per step (k)"""


class Setting(NamedTuple):
    """The drafter and the sampling parameters of one row."""

    drafter: DrafterConfig
    cut: Cut


class AuditConfig(WithToken, WithAuthority, Section):
    """Test what the engine samples, with each drafter and setting, against the policy's exact distributions."""

    model: str
    """the policy: a folder or a Hugging Face name"""
    engine: EngineConfig = EngineConfig()
    recomputation: RecomputationConfig = RecomputationConfig()
    drafters: list[AuditedDrafter] = Field(default=[AuditedDrafter(kind="none")], min_length=1)
    temperature: list[Temperature] = Field(default=[0.0, 0.7, 1.0, 1.2], min_length=1)
    """temperatures to test; 0 takes the most likely token"""
    top_p: list[TopP] = Field(default=[1.0, 0.9], min_length=1)
    """values of top-p to test; 1 keeps all tokens"""
    top_k: list[TopK] = Field(default=[0, 20], min_length=1)
    """values of top-k to test; 0 keeps all tokens"""
    verification: list[VerificationChoice] = Field(default=["standard", "block"], min_length=1)
    """ways to verify drafts"""
    draft_sampling: list[DraftSampling] = Field(default=["probabilistic", "greedy"], min_length=1)
    """ways to sample drafts; a drafter whose drafts are deterministic has only greedy"""
    every_combination: bool = False
    """test the whole grid, instead of a set of rows in which every pair of values occurs"""

    tokens: int = Field(default=50_000, ge=100)
    """sample at least this many tokens in each row"""
    response_tokens: int = Field(default=8, ge=2)
    """length of every response; short responses hold more tokens that the policy is unsure of"""
    contexts: int = Field(default=16, ge=1)
    """number of prompts; one in eight is so long that its responses end at the context limit"""
    prompts: ExistingFile | None = None
    """JSON lines with `prompt`, `messages` or `prompt_token_ids`. After real prompts whole drafts are accepted more
    often, so the bonus token is tested more. When not given, each prompt is a few random tokens: the policy is unsure
    after them, so the test is sharper"""
    seed: int = 0
    """seed of the random prompts and of the sampling"""

    limit: float = Field(default=4.0, gt=0.0)
    """a row fails from this many standard deviations; the other tests use the same level"""
    logprob_tolerance: float = Field(default=1e-4, gt=0.0)
    """largest difference in nats between returned and recomputed log-probabilities; meant for an engine in float32"""
    endpoint: Endpoint | None = None
    """audit this running service, with its own drafter and verification, instead of starting engines; the settings of
    engines and drafters are then not read"""
    output: Path = Path("report/audit")
    """folder for audit.json and audit.md"""

    @model_validator(mode="after")
    def known_drafters(self) -> "AuditConfig":
        for drafter in self.drafters:
            make_drafter(self.drafter_config(drafter)).speculative_config()
        return self

    @staticmethod
    def drafter_config(drafter: AuditedDrafter) -> DrafterConfig:
        return DrafterConfig(schedule="fixed", **drafter.model_dump())

    def service(self, drafter: DrafterConfig) -> ServiceConfig:
        return ServiceConfig(model=self.model, engine=self.engine, drafter=drafter)

    @property
    def context_limit(self) -> int:
        """The smallest context limit of all drafters, because they all answer the same prompts."""
        return min(self.service(self.drafter_config(drafter)).context_limit for drafter in self.drafters)

    def rows(self) -> list[Setting]:
        """The settings of this configuration's engines."""
        drafters = [self.drafter_config(drafter) for drafter in self.drafters]
        factors: list[list[Any]] = [
            drafters,
            self.temperature,
            self.top_p,
            self.top_k,
            self.verification,
            self.draft_sampling,
        ]
        choose: Callable[..., Iterable[Sequence[Any]]] = product if self.every_combination else pairwise
        settings = []
        for drafter, temperature, top_p, top_k, verification, sampling in choose(*factors):
            chosen = {
                "verification": verification,
                "draft_sampling": sampling if make_drafter(drafter).samples else "greedy",  # deterministic drafts
            }
            settings.append(Setting(drafter.model_copy(update=chosen), Cut(temperature, top_p, top_k)))
        unique = {setting.drafter.model_dump_json() + str(setting.cut): setting for setting in settings}
        # In the configured order. Two drafters may be of the same kind.
        order = [(drafter.kind, drafter.model, drafter.draft_tokens) for drafter in drafters]

        def position(setting: Setting) -> tuple[int, Cut]:
            drafter = setting.drafter
            return order.index((drafter.kind, drafter.model, drafter.draft_tokens)), setting.cut

        return sorted(unique.values(), key=position)

    def rows_of(self, drafter: DrafterConfig) -> list[Setting]:
        """The settings of a running service, whose drafter cannot be changed."""
        cuts = product(self.temperature, self.top_p, self.top_k)
        return [Setting(drafter, Cut(*cut)) for cut in cuts]


def pairwise(*factors: list[Any]) -> Iterable[Sequence[Any]]:
    """Rows in which every pair of values of any two factors occurs."""
    if len(factors) < 2:
        return [[value] for value in factors[0]]
    indices = [list(range(len(factor))) for factor in factors]
    return [[factor[i] for factor, i in zip(factors, row, strict=True)] for row in AllPairs(indices)]

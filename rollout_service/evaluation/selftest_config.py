"""SelftestConfig: what is served, as for `launch`, and how much of it is checked. Imports no torch."""

import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, field_validator, model_validator

from drafters.registry import KINDS, DrafterConfig, make_drafter
from drafters.settings import ExistingFile
from rollout_service.config import EngineConfig, ServiceConfig
from rollout_service.evaluation.audit_config import AuditConfig
from rollout_service.evaluation.cut import Cut

DEMO = "deploy/demo"
DEMO_POLICY = f"{DEMO}/models/policy"
DEMO_ENGINE: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 32, "kv_cache_gib": 0.25}
CONTEXT = 192
"""tokens of context, so that responses at the limit are short; enough to time steps with 16 draft tokens"""


class Tolerance(NamedTuple):
    """Limits of the differences between returned and recomputed log-probabilities, in nats."""

    largest: float
    mean: float


TOLERANCES = {
    # An engine on a CPU is within 1e-5. Matrix products in TF32 are not within 1e-3, and are to be noticed.
    "float32": Tolerance(1e-3, 1e-4),
    # On an H100 the mean was 7e-3 in bfloat16, and single tokens differed by 0.6 (docs/gpu.md).
    "bfloat16": Tolerance(float("inf"), 2e-2),
    "float16": Tolerance(float("inf"), 2e-2),
}
"""by the engine's dtype"""


class SelftestConfig(ServiceConfig):
    """Check in two minutes that engines on this machine sample, verify drafts and take new weights rightly.

    It reads the file of `rollout-service launch`. What concerns the HTTP front, its queue and its state is not used,
    and the engine runs on this machine, with a short context."""

    model: str = DEMO_POLICY
    """the policy: a folder or a Hugging Face name; when not given, the demo's policy and drafters are checked"""
    engine: EngineConfig = Field(default_factory=lambda: EngineConfig(**DEMO_ENGINE))
    """of the demo: float32, 32 completions at a time and 0.25 GiB of KV cache, unless given"""
    drafters: list[str] = Field(default_factory=list)
    """kinds of drafters to check, each on an engine of its own; when not given, none and the configured one, which for
    the demo is its service's"""
    prompts: ExistingFile | None = None
    """JSON lines with `prompt`, `messages` or `prompt_token_ids`, on which acceptance is measured; when not given, the
    demo's prompts, or random tokens for another model"""
    tokens: int = Field(default=4096, ge=1024)
    """sample at least this many tokens for each temperature"""
    limit: float = Field(default=4.0, gt=0.0)
    """a check fails from this many standard deviations; other tests use the same level"""
    output: Path | None = None
    """JSON file to write"""

    @model_validator(mode="before")
    @classmethod
    def of_the_demo(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """A field of the engine that is given leaves the demo's others as they are."""
        given = fields.get("engine")
        if fields.get("model", DEMO_POLICY) == DEMO_POLICY and isinstance(given, dict):
            return fields | {"engine": DEMO_ENGINE | given}
        return fields

    @field_validator("drafters")
    @classmethod
    def known_kinds(cls, kinds: list[str]) -> list[str]:
        for kind in kinds:
            if kind not in KINDS:
                raise ValueError(f"unknown kind {kind!r}; the kinds are {', '.join(KINDS)}")
        return kinds

    @model_validator(mode="after")
    def has_its_drafters_and_room(self) -> "SelftestConfig":
        if self.is_demo and not Path(DEMO_POLICY).is_dir():
            raise ValueError(
                f"model: there is no {DEMO_POLICY} here; go to the root of the checkout, or give your model"
            )
        if self.engine.max_model_len < CONTEXT:
            raise ValueError(f"engine.max_model_len: a self-test needs {CONTEXT} tokens of context; raise it")
        for drafter in self.checked():
            make_drafter(drafter).speculative_config()
        return self

    @property
    def is_demo(self) -> bool:
        return self.model == DEMO_POLICY

    def checked(self) -> list[DrafterConfig]:
        """The drafters to check, with draft lengths that can be set."""
        configured = self.drafter.kind
        if self.is_demo and not self.drafter.drafts:
            configured = tomllib.loads(Path(DEMO, "service.toml").read_text(encoding="utf-8"))["drafter"]["kind"]
        return [self._drafter(kind) for kind in dict.fromkeys(self.drafters or ["none", configured])]

    def _drafter(self, kind: str) -> DrafterConfig:
        if kind == "none":
            return DrafterConfig()
        drafter = self.drafter if kind == self.drafter.kind else DrafterConfig(kind=kind)
        if self.is_demo and KINDS[kind].has_folder and drafter.model is None:
            drafter = drafter.model_copy(update={"model": f"{DEMO}/models/{kind}"})
        whole = [(1, self.engine.max_num_seqs, drafter.draft_tokens)]
        return drafter.model_copy(update={"schedule": whole})

    def service(self, drafter: DrafterConfig) -> ServiceConfig:
        engine = self.engine.model_copy(update={"max_model_len": CONTEXT})
        return ServiceConfig(model=self.model, engine=engine, drafter=drafter)

    def sampling(self) -> AuditConfig:
        """The audit whose prompts and requests are used."""
        return AuditConfig(model=self.model, engine=self.engine, tokens=self.tokens, limit=self.limit)

    def acceptance_prompts(self) -> Path | None:
        of_demo = Path(self.model).is_relative_to(Path(DEMO) / "models")
        return self.prompts or (Path(DEMO) / "prompts.jsonl" if of_demo else None)

    def cuts(self) -> list[Cut]:
        """What is sampled. In 16 bits the most likely token may rightly be another than in float32."""
        sampled = [Cut(1.0), Cut(0.7, 0.9, 20)]
        return [*sampled, Cut(0.0)] if self.engine.dtype == "float32" else sampled

    @property
    def tolerance(self) -> Tolerance:
        return TOLERANCES[self.engine.dtype]

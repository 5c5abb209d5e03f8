"""CalibrateConfig: which drafter, on which prompts, at which batch sizes, and how long. Imports no torch."""

from pathlib import Path

from pydantic import Field, PositiveInt, field_validator, model_validator

from drafters.registry import DrafterConfig, make_drafter
from drafters.settings import ExistingFile, Section
from rollout_service.config import EngineConfig, ServiceConfig
from rollout_service.protocol import Temperature


class CalibrateConfig(Section):
    """Measure what a step costs and how many drafts are accepted; choose the draft length for each batch size."""

    model: str
    """the policy: a folder or a Hugging Face name"""
    engine: EngineConfig = EngineConfig()
    drafter: DrafterConfig
    """`draft_tokens` is the longest draft that is measured; `schedule` is not used"""
    prompts: ExistingFile
    """JSON lines with `prompt`, `messages` or `prompt_token_ids`; acceptance is measured on responses to them"""
    batch_sizes: list[PositiveInt] = Field(default=[1, 2, 4, 8, 16, 32, 64], min_length=1)
    """numbers of completions that run at a time; those above engine.max_num_seqs are left out"""
    steps: int = Field(default=8, ge=4)
    """steps to measure for each batch size and draft length, in each round"""
    rounds: int = Field(default=6, ge=1)
    """rounds of measurement; the two engines take turns in each"""
    responses: int = Field(default=128, ge=1)
    """number of responses over which acceptance is measured"""
    response_tokens: int = Field(default=256, ge=1)
    """most tokens of such a response; the speed-up is predicted for responses of this length"""
    responses_per_stream: int = Field(default=2, ge=1)
    """responses that each stream generates in turn, for the predicted speed-up; the fewer, the more it matters that
    streams do not end together"""
    temperature: Temperature = 1.0
    """temperature of the responses"""
    output: Path = Path("report/schedule.json")
    """file to write"""

    @field_validator("drafter")
    @classmethod
    def has_a_drafter(cls, drafter: DrafterConfig) -> DrafterConfig:
        if not drafter.drafts:
            raise ValueError("kind: none drafts nothing; name the drafter whose draft lengths are to be chosen")
        made = make_drafter(drafter)
        made.speculative_config()
        if not made.samples:
            raise ValueError(
                f"kind: {drafter.kind} drafts only what it finds, so no step of a given draft length can be measured; "
                'use schedule = "fixed", or ranges'
            )
        return drafter

    @model_validator(mode="after")
    def has_a_batch_size(self) -> "CalibrateConfig":
        if not self.sizes:
            limit = f"engine.max_num_seqs, which is {self.engine.max_num_seqs}"
            raise ValueError(f"batch_sizes: all are above {limit}; give smaller ones")
        return self

    def service(self, drafter: DrafterConfig) -> ServiceConfig:
        return ServiceConfig(model=self.model, engine=self.engine, drafter=drafter)

    def measured_drafter(self) -> DrafterConfig:
        """The drafter for an engine whose draft lengths can be changed, and which measures nothing by itself."""
        ranges = [(1, self.engine.max_num_seqs, self.drafter.draft_tokens)]
        return self.drafter.model_copy(update={"schedule": ranges})

    @property
    def sizes(self) -> list[int]:
        return sorted({size for size in self.batch_sizes if size <= self.engine.max_num_seqs})

"""CalibrateConfig: which drafter, on which prompts, at which batch sizes, and how long. Imports no torch."""

from pathlib import Path

from pydantic import Field, FilePath, PositiveInt, field_validator, model_validator

from drafters.registry import DrafterConfig, make_drafter
from drafters.settings import Section
from rollout_service.config import EngineConfig, ServiceConfig
from rollout_service.protocol import Temperature


class CalibrateConfig(Section):
    """Measure what a step costs and what is accepted; choose the draft length for each batch size by the clock."""

    model: str
    """the policy: a folder or a Hugging Face name"""
    engine: EngineConfig = EngineConfig()
    drafter: DrafterConfig
    """`draft_tokens` is the longest draft that is measured; `schedule` has no part in it"""
    prompts: FilePath
    """JSON lines with `prompt`, `messages` or `prompt_token_ids`: acceptance is measured on their responses"""
    batch_sizes: list[PositiveInt] = Field(default=[1, 2, 4, 8, 16, 32, 64], min_length=1)
    """completions at a time; those above engine.max_num_seqs are left out"""
    steps: int = Field(default=8, ge=4)
    """measured of each batch size and draft length, in each round"""
    rounds: int = Field(default=6, ge=1)
    responses: int = Field(default=128, ge=1)
    """completions of the prompts whose acceptance is measured"""
    response_tokens: int = Field(default=256, ge=1)
    """the longest of them; the speed-up is predicted for responses of this length"""
    responses_per_stream: int = Field(default=2, ge=1)
    """that the speed-up is predicted for, one after the other: the fewer, the more it counts that streams end apart"""
    temperature: Temperature = 1.0
    output: Path = Path("report/schedule.json")
    """the file to write"""

    @field_validator("drafter")
    @classmethod
    def has_a_drafter(cls, drafter: DrafterConfig) -> DrafterConfig:
        if not drafter.drafts:
            raise ValueError("kind: none drafts nothing: name the drafter whose draft lengths are to be chosen")
        made = make_drafter(drafter)
        made.speculative_config()
        if not made.samples:
            raise ValueError(
                f"kind: {drafter.kind} drafts only what it finds, so that there is no step of a given draft length to "
                'measure; use schedule = "fixed", or ranges'
            )
        return drafter

    @model_validator(mode="after")
    def has_a_batch_size(self) -> "CalibrateConfig":
        if not self.sizes:
            raise ValueError(f"batch_sizes: all are above engine.max_num_seqs, {self.engine.max_num_seqs}")
        return self

    def service(self, drafter: DrafterConfig) -> ServiceConfig:
        return ServiceConfig(model=self.model, engine=self.engine, drafter=drafter)

    def measured_drafter(self) -> DrafterConfig:
        """The drafter on an engine whose draft lengths can be changed, and which measures nothing by itself."""
        ranges = [(1, self.engine.max_num_seqs, self.drafter.draft_tokens)]
        return self.drafter.model_copy(update={"schedule": ranges})

    @property
    def sizes(self) -> list[int]:
        return sorted({size for size in self.batch_sizes if size <= self.engine.max_num_seqs})

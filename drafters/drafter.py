"""Drafter: one kind's engine configuration, the tensors it owns, and what it needs from the policy."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from drafters.files.home import in_home
from drafters.schedule import Calibration, Range, check_ranges
from drafters.settings import Section

DraftSampling = Literal["probabilistic", "greedy"]
VerificationChoice = Literal["auto", "standard", "block"]
LOSSY_OPTIONS = {
    "acceptance_method", "lenience", "posterior_alpha", "posterior_threshold", "rejection_sample_method",
    "synthetic_acceptance_length", "synthetic_acceptance_rates", "typical_acceptance",
    "typical_acceptance_sampler_posterior_alpha", "typical_acceptance_sampler_posterior_threshold",
}  # fmt: skip
"""names under which engines offer to accept drafts that the policy would not have sampled"""


class DraftSettings(Section):
    """What a drafter of any kind can be told; registry.py adds what only some kinds read."""

    kind: str = "none"
    model: str | None = None
    """folder or Hugging Face name of the drafter's checkpoint, for the kinds that have one apart from the policy's"""
    draft_tokens: int = Field(default=3, ge=1, le=16)
    """tokens drafted per step (k); the most that a schedule may draft"""
    schedule: str | list[Range] | Calibration = "auto"
    """how many of them at each batch size. auto: by the clock, from costs that an engine measures when it starts and
    the acceptance that it sees; a file of `rollout-service calibrate`: the same, from its costs and acceptance; ranges
    [smallest batch size, largest, draft tokens]: as they say; fixed, and auto of deterministic drafts: always
    draft_tokens"""
    draft_sampling: DraftSampling = "probabilistic"
    """probabilistic: sampled, and verified against the drafter's distribution; greedy: the most likely token. N-gram
    drafts are deterministic, whatever this says"""
    verification: VerificationChoice = "auto"
    """standard: one draft after the other; block: the draft as a whole, which accepts more; both are lossless. On a CPU
    they are the project's own (drafters/verification.py), and auto is the engine's standard one where it passes its
    self-test; on a GPU they are the engine's, and auto is standard"""

    @property
    def drafts(self) -> bool:
        """Whether there is a drafter at all."""
        return self.kind != "none"

    @field_validator("schedule", mode="before")
    @classmethod
    def unwrapped(cls, schedule: Any) -> Any:
        """A flag's value comes as a list of one, since the field may be a list."""
        return schedule[0] if isinstance(schedule, list) and [type(s) for s in schedule] == [str] else schedule

    @model_validator(mode="after")
    def has_a_right_schedule(self) -> Self:
        if isinstance(self.schedule, list):
            check_ranges(self.schedule, self.draft_tokens)
        elif self.drafts:
            self.calibration()
        return self

    def calibration(self) -> Calibration | None:
        """In the file that `schedule` names, or itself. Raises ValueError when it cannot be read, or is another
        drafter's."""
        if isinstance(self.schedule, list) or self.schedule in ("auto", "fixed"):
            return None
        if isinstance(self.schedule, Calibration):  # a file of the front's node, read there
            return self.schedule
        try:
            calibration = Calibration.model_validate_json(in_home(Path(self.schedule)).read_bytes())
        except (OSError, ValidationError) as error:
            reason = error.strerror if isinstance(error, OSError) else "no file of `rollout-service calibrate`"
            raise ValueError(f"schedule: {self.schedule}: {reason}; or write auto, fixed, or ranges") from None
        found, needed = (calibration.kind, calibration.draft_tokens), (self.kind, self.draft_tokens)
        if found != needed:
            shown = "kind = {!r} and draft_tokens = {}"
            raise ValueError(
                f"schedule: {self.schedule} was calibrated for {shown.format(*found)}, and the drafter has "
                f"{shown.format(*needed)}: calibrate again, or make them equal"
            )
        return calibration

    @model_validator(mode="before")
    @classmethod
    def lossless(cls, data: Any) -> Any:
        for name in LOSSY_OPTIONS & set(data if isinstance(data, dict) else ()):
            raise ValueError(
                f"{name}: a relaxed acceptance changes what is sampled, and is not offered; "
                'use verification = "standard" or "block"'
            )
        return data


class Drafter(ABC):
    """One kind of drafter, configured. A new kind is a file with a subclass and a line in `registry.py`."""

    kind: ClassVar[str]
    options: ClassVar[type[DraftSettings]] = DraftSettings
    """the settings that it can be told: those of any kind, or a subclass that adds its own"""
    has_folder: ClassVar[bool] = False
    """whether `model` is read: the folder of a checkpoint of its own"""
    shape: ClassVar[type[Section]] = Section
    """what `drafters train` can be told of the shape of a new one"""
    samples: ClassVar[bool] = True
    """whether drafts can be drawn from a distribution (else they are deterministic, and verified as one-hot)"""

    def __init__(self, config: DraftSettings):
        """Raises ValueError for a field that is given and means nothing to the kind."""
        self.config = config
        try:
            config.refuse_unread(self.unread(config), f"kind = {self.kind!r}")
        except ValueError as error:
            raise ValueError(f"drafter.{error}") from error

    def unread(self, config: DraftSettings) -> list[str]:
        """Fields of `config` that mean nothing to the kind."""
        own = {name for name in self.options.model_fields if name != "model" or self.has_folder}
        return [name for name in type(config).model_fields if name not in own]

    @abstractmethod
    def speculative_config(self) -> dict[str, Any] | None:
        """vLLM's `speculative_config` engine argument; None when nothing is drafted."""

    def owns(self, name: str) -> bool:
        """Whether the checkpoint tensor `name` is the drafter's. These, and no others, are in a drafter's update."""
        return False

    def checkpoint(self, policy: Path) -> Path | None:
        """The folder that holds the drafter's own tensors; None when it has none."""
        return None

    def check(  # noqa: B027
        self, policy_config: dict[str, Any], own_config: dict[str, Any] | None, tensors: Collection[str]
    ) -> None:
        """Raise ValueError naming the field when policy and drafter do not fit: `policy_config` and `own_config` are
        their `config.json`, the latter None when the drafter has no folder of its own. `tensors`: the names in the
        checkpoint that holds the drafter; none when it has no tensors."""

    @classmethod
    def recognised(cls, config: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any] | None:
        """What `drafters inspect` says of a checkpoint of this kind; None for any other. `config` is its config.json,
        `sizes` the number of elements of each of its tensors by name."""
        return None

    def _model(self) -> str:
        if self.config.model is None:
            raise ValueError(f"drafter.model: kind {self.kind!r} needs the folder or name of its checkpoint")
        return self.config.model

    def _sampled(self, method: str, **more: Any) -> dict[str, Any]:
        return {
            "method": method,
            "num_speculative_tokens": self.config.draft_tokens,
            "draft_sample_method": self.config.draft_sampling,
            **more,
        }

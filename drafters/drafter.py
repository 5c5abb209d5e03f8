"""Drafter: one kind's engine configuration, the tensors it owns, and what it needs from the policy."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from drafters.files.home import in_home
from drafters.policy_costs import DraftCosts
from drafters.runners import OnRunner, Runner
from drafters.schedule import Calibration, Range, check_ranges
from drafters.settings import Section

DraftSampling = Literal["probabilistic", "greedy"]
VerificationChoice = Literal["auto", "standard", "block"]
LOSSY_OPTIONS = {
    "acceptance_method", "lenience", "posterior_alpha", "posterior_threshold", "rejection_sample_method",
    "synthetic_acceptance_length", "synthetic_acceptance_rates", "typical_acceptance",
    "typical_acceptance_sampler_posterior_alpha", "typical_acceptance_sampler_posterior_threshold",
}  # fmt: skip
"""engine options that accept drafts which the policy would not have sampled"""


class DraftSettings(Section):
    """Settings of a drafter of any kind. registry.py adds the fields that only some kinds read."""

    kind: str = "none"
    model: str | None = None
    """folder or Hugging Face name of the drafter's checkpoint; only for kinds with a checkpoint of their own"""
    draft_tokens: int = Field(default=3, ge=1, le=16)
    """tokens drafted per step (k); a schedule never drafts more"""
    schedule: str | list[Range] | Calibration = "auto"
    """the draft length at each batch size. auto: each engine measures its steps when it starts, follows acceptance, and
    picks the length that it predicts to be fastest; for n-gram drafts, auto is fixed. A file of `rollout-service
    calibrate`: as auto, but starting from the costs and the acceptance in the file. Ranges [smallest batch size,
    largest, draft tokens]: the given length for each range. fixed: always draft_tokens"""
    draft_sampling: DraftSampling = "probabilistic"
    """probabilistic: drafts are sampled and verified against the drafter's distribution; greedy: each draft is the
    drafter's most likely token. N-gram drafts are deterministic and ignore this field"""
    verification: VerificationChoice = "auto"
    """standard verifies one draft token after the other; block verifies the draft as a whole and accepts at least as
    much. Both are lossless. On a CPU, both are this project's functions (drafters/verification.py), and auto is vLLM's
    standard verification if it passes its self-test. On a GPU, both are vLLM's functions, and auto is standard"""

    @property
    def drafts(self) -> bool:
        """Whether there is a drafter at all."""
        return self.kind != "none"

    @field_validator("schedule", mode="before")
    @classmethod
    def unwrapped(cls, schedule: Any) -> Any:
        """A flag gives a list of one string, because the field may be a list; the string is what is meant."""
        return schedule[0] if isinstance(schedule, list) and [type(s) for s in schedule] == [str] else schedule

    @model_validator(mode="after")
    def has_a_right_schedule(self) -> Self:
        if isinstance(self.schedule, list):
            check_ranges(self.schedule, self.draft_tokens)
        elif self.drafts:
            self.calibration()
        return self

    def calibration(self) -> Calibration | None:
        """The calibration that `schedule` is or names; None if it is neither.

        Raises ValueError when the file cannot be read, or was measured with another drafter.
        """
        if isinstance(self.schedule, list) or self.schedule in ("auto", "fixed"):
            return None
        if isinstance(self.schedule, Calibration):  # the front has read the file, on its own node
            return self.schedule
        try:
            calibration = Calibration.model_validate_json(in_home(Path(self.schedule)).read_bytes())
        except (OSError, ValidationError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a file of `rollout-service calibrate`"
            raise ValueError(f"schedule: {self.schedule}: {reason}; give such a file, auto, fixed, or ranges") from None
        found, needed = (calibration.kind, calibration.draft_tokens), (self.kind, self.draft_tokens)
        if found != needed:
            shown = "kind = {!r} and draft_tokens = {}"
            raise ValueError(
                f"schedule: {self.schedule} was calibrated for {shown.format(*found)}, but the drafter has "
                f"{shown.format(*needed)}: calibrate again, or make them equal"
            )
        return calibration

    @model_validator(mode="before")
    @classmethod
    def lossless(cls, data: Any) -> Any:
        for name in LOSSY_OPTIONS & set(data if isinstance(data, dict) else ()):
            raise ValueError(
                f"{name}: relaxed acceptance changes what is sampled, so it is not offered; "
                'use verification = "standard" or "block"'
            )
        return data


class Drafter(ABC):
    """One configured drafter. A new kind is a file with a subclass, and a line in `registry.py`."""

    kind: ClassVar[str]
    options: ClassVar[type[DraftSettings]] = DraftSettings
    """the class of its settings: DraftSettings, or a subclass that adds the kind's own fields"""
    has_folder: ClassVar[bool] = False
    """whether the kind has a checkpoint folder of its own, so that `model` is read"""
    shape: ClassVar[type[Section]] = Section
    """the fields that give the shape of a new drafter to `drafters train`"""
    samples: ClassVar[bool] = True
    """whether drafts can be drawn from a distribution; if not, they are deterministic and verified as one-hot"""
    on: ClassVar[Mapping[Runner, OnRunner]] = {"v1": OnRunner(rests=True), "v2": OnRunner()}
    """what the kind does on each of vLLM's runners; a model that drafts does this"""

    def __init__(self, config: DraftSettings):
        """Raises ValueError for a field that is given but that the kind does not read."""
        self.config = config
        try:
            config.refuse_unread(self.unread(config), f"kind = {self.kind!r}")
        except ValueError as error:
            raise ValueError(f"drafter.{error}") from error

    def unread(self, config: DraftSettings) -> list[str]:
        """Fields of `config` that the kind does not read."""
        own = {name for name in self.options.model_fields if name != "model" or self.has_folder}
        return [name for name in type(config).model_fields if name not in own]

    @abstractmethod
    def speculative_config(self) -> dict[str, Any] | None:
        """vLLM's `speculative_config` engine argument; None when nothing is drafted."""

    def owns(self, name: str) -> bool:
        """Whether the checkpoint tensor `name` is the drafter's. A drafter's update holds exactly these tensors."""
        return False

    def checkpoint(self, policy: Path) -> Path | None:
        """The folder that holds the drafter's own tensors; None when it has none."""
        return None

    def check(  # noqa: B027
        self, policy_config: dict[str, Any], own_config: dict[str, Any] | None, tensors: Collection[str]
    ) -> None:
        """Raises ValueError, which names the field, when policy and drafter do not fit.

        `policy_config` and `own_config` are the contents of their `config.json`; `own_config` is None for a drafter
        without a folder of its own. `tensors` are the names in the checkpoint that holds the drafter; it is empty for
        a drafter without tensors.
        """

    def costs(self, policy: Any) -> DraftCosts | None:
        """What drafting costs; None for a drafter without weights. `policy` is its configuration of transformers.

        Raises ValueError for an architecture without formulas.
        """
        return None

    @classmethod
    def recognised(cls, config: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any] | None:
        """What `drafters inspect` prints for a checkpoint of this kind; None for any other checkpoint.

        `config` is the content of its config.json; `sizes` maps each of its tensors to the number of its elements.
        """
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

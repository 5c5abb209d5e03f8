"""StudyConfig: the policy, its drafters, and the size of each part of the study."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from drafters.registry import DrafterConfig, HeadShape, LearnerKind
from drafters.settings import Section
from drafters.training.config import OfflineTraining
from rollout_service.config import EngineConfig


class Lengths(Section):
    """Acceptance and speed by draft length."""

    draft_tokens: list[int] = Field(default=[1, 2, 3, 4, 5, 6, 7], min_length=1)
    streams: int = Field(default=8, ge=1)
    """completions that run at the same time"""
    completions: int = Field(default=96, ge=2)
    """completions for each drafter and draft length"""
    response_tokens: int = Field(default=48, ge=8)
    """length of every completion. The end-of-sequence token does not end a completion, so all do the same work"""


class Initialisation(Section):
    """Acceptance of drafters that are trained on the policy's own rollouts and on other text."""

    kinds: list[LearnerKind] = Field(default=["eagle3", "draft_model"])
    heads: dict[LearnerKind, HeadShape] = Field(default_factory=dict)
    training: OfflineTraining = OfflineTraining()
    samples: int = Field(default=1024, ge=1)
    """completions of the policy for the training problems of `moving.train.task`, and number of other texts"""
    draft_tokens: int = Field(default=3, ge=1)
    response_tokens: int = Field(default=160, ge=8)
    """length of the longest completion"""
    other_text: Path | None = None
    """JSON lines or text, as `drafters train` reads them; if not given, problems of other reasoning-gym tasks"""
    other_tasks: list[str] = Field(default=["basic_arithmetic", "leg_counting", "gcd", "number_sorting"], min_length=1)
    """names of those tasks"""


class Moving(Section):
    """Acceptance while a policy moves far in training, with a drafter that is frozen, trained online, or adaptive."""

    kind: Literal["mtp", "eagle3", "draft_model"] = "eagle3"
    """kind of the drafter; its checkpoint is the one in `drafters`"""
    train: dict[str, Any] = Field(default_factory=dict)
    """fields of `rl-loop train`"""
    arms: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """the arms by name, each with fields of `online_drafter.training`"""


class StudyConfig(Section):
    """Reproduce findings about speculation in RL from large runs in miniature, with any policy."""

    model: str
    """the policy: a folder or a Hugging Face name"""
    prompts: Path
    """JSON lines with `prompt`"""
    engine: EngineConfig = EngineConfig()
    drafters: list[DrafterConfig] = Field(min_length=1)
    lengths: Lengths = Lengths()
    initialisation: Initialisation = Initialisation()
    moving: Moving = Moving()
    seed: int = 0
    work: Path = Path("report/study")
    """folder for intermediate files: samples, drafters, training runs"""
    output: Path = Path("report/study")
    """folder for the results: tables, plots, JSON"""
    parts: list[str] = Field(default=["lengths", "initialisation", "moving", "report"])
    """parts to run; a part is skipped if its result is in `output`"""

    @model_validator(mode="after")
    def has_a_task(self) -> "StudyConfig":
        if "task" not in self.moving.train and {"initialisation", "moving"} & set(self.parts):
            raise ValueError("moving.train.task: the parts initialisation and moving need a task")
        return self

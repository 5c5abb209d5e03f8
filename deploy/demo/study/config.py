"""StudyConfig: the policy, its drafters, and how long each part of the study may take."""

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
    """completions at the same time"""
    completions: int = Field(default=96, ge=2)
    """for each drafter and draft length"""
    response_tokens: int = Field(default=48, ge=8)
    """of every completion: the end of sequence does not end it, so all do the same work"""


class Initialisation(Section):
    """Drafters trained on the policy's own rollouts, and on other text."""

    kinds: list[LearnerKind] = Field(default=["eagle3", "draft_model"])
    heads: dict[LearnerKind, HeadShape] = Field(default_factory=dict)
    training: OfflineTraining = OfflineTraining()
    samples: int = Field(default=1024, ge=1)
    """completions of the policy to the training problems of `moving.train.task`, and as many texts"""
    draft_tokens: int = Field(default=3, ge=1)
    response_tokens: int = Field(default=160, ge=8)
    """longest completion"""
    other_text: Path | None = None
    """JSON lines or text, as `drafters train` reads them; problems of other reasoning-gym tasks when not given"""
    other_tasks: list[str] = Field(default=["basic_arithmetic", "leg_counting", "gcd", "number_sorting"], min_length=1)
    """the reasoning-gym tasks"""


class Moving(Section):
    """A policy that moves far in training; drafters that do not follow, that follow, and that follow when needed."""

    kind: Literal["mtp", "eagle3", "draft_model"] = "eagle3"
    """the drafter; its checkpoint is the one in `drafters`"""
    train: dict[str, Any] = Field(default_factory=dict)
    """fields of `rl-loop train`"""
    arms: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """name: fields of `online_drafter.training`"""


class StudyConfig(Section):
    """What is known of speculation in RL from large runs, in miniature and with any policy."""

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
    """folder of what is made on the way: samples, drafters, training runs"""
    output: Path = Path("report/study")
    """folder of the tables, plots and figures (JSON)"""
    parts: list[str] = Field(default=["lengths", "initialisation", "moving", "report"])
    """what to do; a part that has its result in `output` already is not done again"""

    @model_validator(mode="after")
    def has_a_task(self) -> "StudyConfig":
        if "task" not in self.moving.train and {"initialisation", "moving"} & set(self.parts):
            raise ValueError("moving.train.task: the parts initialisation and moving need the problems of a task")
        return self

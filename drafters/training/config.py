"""TrainDrafterConfig: every setting of `drafters train`. It imports no torch, so `--help` and errors come at once."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import CliImplicitFlag

from drafters.files.home import in_home
from drafters.registry import HeadShape, LearnerKind
from drafters.settings import ExistingFile, Section, Threads

Objective = Literal["soft_cross_entropy", "total_variation", "top_k"]


class DraftObjective(Section):
    """The objective of offline and online training: to be close to the policy's distribution at each draft step."""

    draft_steps: int = Field(default=3, ge=1, le=16)
    """number of draft steps that are unrolled and trained"""
    step_decay: float = Field(default=0.8, gt=0, le=1)
    """weight of a draft step's loss relative to that of the step before (0.8 in Eagle3)"""
    loss: Objective = "soft_cross_entropy"
    """distance from the policy's distribution: soft_cross_entropy (forward KL), total_variation (1 minus the
    acceptance), or top_k (forward KL over the policy's most likely tokens and one class for all others)"""
    top_k: int = Field(default=32, ge=1)
    """number of the policy's most likely tokens that loss = top_k keeps"""

    @model_validator(mode="after")
    def _keeps_tokens(self) -> Self:
        if self.loss != "top_k":
            self.refuse_unread(["top_k"], f"loss = {self.loss!r}")
        return self


class OfflineTraining(DraftObjective):
    """How a drafter is trained on a fixed set of samples (AdamW, cosine schedule, no dropout)."""

    steps: int = Field(default=400, ge=1)
    """optimiser steps, including those before a resume"""
    batch_size: int = Field(default=32, ge=1)
    """samples per step"""
    learning_rate: float = Field(default=2e-3, gt=0)
    """peak learning rate"""
    warmup: int = Field(default=20, ge=0)
    """steps of linear warm-up"""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's weight decay"""
    temperature: float = Field(default=1.0, gt=0, le=10)
    """the temperature at which the policy will sample; the distributions of policy and drafter are compared at it"""
    validate_every: int = Field(default=50, ge=1)
    """steps between two measurements of acceptance by position on held-out samples"""
    seed: int = 0
    """seed for the order of the samples and the initial weights of a new drafter"""


class TrainDrafterConfig(Section):
    """Train a drafter on rollouts or other text, from scratch or from a checkpoint."""

    kind: LearnerKind
    """the kind of drafter; mtp only for architectures for which vLLM serves an MTP head (qwen3_next)"""
    policy: str
    """the policy: a folder or a Hugging Face name"""
    data: ExistingFile
    """JSON lines: groups as POST /v1/rollouts returns them, or objects with one of these: `prompt_token_ids` and
    `response_token_ids`; `prompt` (text or messages) and `response`; `messages`; `text`. Or a plain text file (.txt)"""
    out: Path
    """folder to write; vLLM loads it unchanged (for mtp, it holds the policy and the head)"""
    init: str | None = None
    """checkpoint to start from, instead of from scratch: a drafter's folder or Hugging Face name (for eagle3 in the
    layout of SpecForge or speculators); for mtp, a policy's folder with a head in it"""
    head: HeadShape = HeadShape()
    training: OfflineTraining = OfflineTraining()
    samples: int = Field(default=0, ge=0)
    """use at most this many samples; 0 for all"""
    max_length: int = Field(default=2048, ge=4)
    """samples are cut to this many tokens"""
    validation: float = Field(default=0.05, gt=0, lt=1)
    """share of the samples (the last ones, at most 512) that are held out to measure acceptance"""
    resume: CliImplicitFlag[bool] = False
    """go on from the state in `out`, with the result of an uninterrupted run; if there is no state, start anew"""
    save_every: int = Field(default=100, ge=1)
    """steps between two saved states and checkpoints; both are also saved at the end and when interrupted"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """dtype of the written weights; training is in float32"""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """auto is cuda if there is a GPU"""
    threads: Threads = 0
    """CPU threads; 0 for all"""

    @model_validator(mode="after")
    def _shape_is_read(self) -> Self:
        try:
            self.head.check_reader(self.kind, is_new=self.init is None)
        except ValueError as error:
            raise ValueError(f"head.{error}") from error
        return self

    @model_validator(mode="after")
    def _not_over_itself(self) -> Self:
        for field in ("policy", "init"):
            source = getattr(self, field)
            if source is not None and in_home(Path(source)).resolve() == self.out.resolve():
                raise ValueError(f"out: is the folder of `{field}`, which must not change; choose another")
        return self


class OnlineTraining(DraftObjective):
    """How a drafter is trained while its policy is trained (AdamW, constant learning rate, no dropout)."""

    when: Literal["every", "adaptive", "never"] = "every"
    """every: train once in `every` steps; adaptive: train while the acceptance length is below a fraction of the run's
    best; never: keep the drafter frozen"""
    every: int = Field(default=1, ge=1)
    """least number of steps from one trained step to the next"""
    start_below: float = Field(default=0.95, gt=0, le=1)
    """adaptive: training starts when the acceptance length falls below this fraction of the run's best"""
    stop_above: float = Field(default=0.98, gt=0, le=1)
    """adaptive: training stops when the acceptance length is above this fraction again"""
    push_every: int = Field(default=1, ge=1)
    """trained steps between two pushes to the engines"""
    tokens_per_update: int = Field(default=2048, ge=1)
    """padded tokens of one optimiser update, which has at least one rollout; a step makes several updates if needed"""
    learning_rate: float = Field(default=2e-4, gt=0)
    """learning rate, constant after the warm-up; large steps make a good drafter worse"""
    warmup: int = Field(default=20, ge=0)
    """optimiser updates over which the learning rate rises linearly, because AdamW's first steps have no scale yet"""
    weight_decay: float = Field(default=0.01, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    """the drafter's gradient is clipped to this norm, separately from the policy's"""

    @model_validator(mode="after")
    def _hysteresis(self) -> Self:
        if self.when != "adaptive":
            self.refuse_unread(["start_below", "stop_above"], f"when = {self.when!r}")
        if self.stop_above < self.start_below:
            raise ValueError(f"stop_above: {self.stop_above} is below start_below, {self.start_below}")
        return self

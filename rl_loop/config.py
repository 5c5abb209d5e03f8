"""TrainConfig: the configuration of `rl-loop train`. It imports no torch, so that `--help` and errors come at once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import CliImplicitFlag

from drafters.by_kind import kinds_described
from drafters.registry import KINDS, LearnerKindOrNone
from drafters.settings import Section, Threads
from drafters.training.config import OnlineTraining
from rl_loop.losses.correction_config import CORRECTIONS, AnyCorrection, Truncated
from rl_loop.losses.custom_loss import CustomLoss
from rl_loop.losses.grpo import GRPO
from rl_loop.losses.registry import LOSSES, AnyLoss
from rl_loop.task_config import TaskConfig
from rollout_service.protocol import (
    MAX_COMPLETIONS,
    MAX_GROUPS,
    Endpoint,
    ResponseTokens,
    Sampling,
    Temperature,
    TopK,
    TopP,
    WithAuthority,
    WithToken,
)


class SamplingConfig(Section):
    """How rollouts are sampled, in training and in evaluation."""

    temperature: Temperature = Field(default=1.0, gt=0.0)
    """must be above 0, since a policy gradient needs samples"""
    top_p: TopP = 1.0
    """sample from the smallest set of tokens whose probabilities add up to this"""
    top_k: TopK = 0
    """sample from the k most likely tokens; 0 for all"""
    max_tokens: ResponseTokens = 256
    """longest response, in tokens"""

    def with_seed(self, seed: int) -> Sampling:
        return Sampling(**self.model_dump(), seed=seed)


class OnlineDrafterConfig(Section):
    """Training of the service's drafter along with the policy."""

    kind: LearnerKindOrNone = "none"
    """the kind of drafter that the service runs; none: the drafter is not trained"""
    model: str | None = None
    """the drafter's checkpoint that the service started with: a folder or a Hugging Face name; a kind whose tensors are
    in the policy's checkpoint takes that one by default"""
    training: OnlineTraining = Field(default_factory=OnlineTraining)

    @model_validator(mode="after")
    def _has_checkpoint(self) -> "OnlineDrafterConfig":
        if KINDS[self.kind].has_folder and self.model is None:
            raise ValueError(f"model is needed for kind = {self.kind}")
        return self


def one_with_async(fields: dict[str, Any]) -> int:
    """`--help` shows the name of this function as the default."""
    return int(fields["mode"] == "async")


class TrainConfig(WithToken, WithAuthority, Section):
    """Reinforcement learning against a rollout service."""

    renamed: ClassVar[Mapping[str, str]] = {
        "drafter": "online_drafter",
        "loss_average": "loss.average",
        "normalise_advantages": "loss.normalise_advantages",
        "dynamic_sampling": "loss.dynamic_sampling",
        "overlong_buffer": "loss.overlong_share, a share of max_tokens,",
        "clip_low": "loss.clip_low",
        "clip_high": "loss.clip_high",
    }

    model: str
    """the policy: a folder or a Hugging Face name; the service must serve the same architecture"""
    mode: Literal["sync", "async"] = "sync"
    """sync: each step samples with the policy that it then trains; async: generation goes on during training"""
    endpoint: Endpoint = "http://127.0.0.1:8000"
    """the rollout service"""
    ready_timeout: float = Field(default=600.0, ge=0.0)
    """seconds to wait for the service to be ready"""
    take_over: CliImplicitFlag[bool] = False
    """take over the service from the run that owns its weights; that run then ends with an error"""
    task: TaskConfig = Field(default_factory=TaskConfig)
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    online_drafter: OnlineDrafterConfig = Field(default_factory=OnlineDrafterConfig)

    steps: int = Field(default=100, ge=1)
    """steps of the whole run, including those before a resume"""
    prompts_per_step: int = Field(default=32, ge=1, le=MAX_GROUPS)
    """groups in a step"""
    completions: int = Field(default=8, ge=2, le=MAX_COMPLETIONS)
    """completions in a group; at least 2, since each reward is compared with the others of its group"""
    loss: AnyLoss = Field(
        default=GRPO(),
        description="The loss, by kind; each has the defaults of its paper.\n" + kinds_described([*LOSSES, CustomLoss]),
    )
    dynamic_sampling_rounds: int = Field(default=10, ge=1)
    """sync, with loss.dynamic_sampling: a step trains on what it has after this many rounds of prompts"""
    correction: AnyCorrection = Field(
        default=Truncated(),
        description="The correction for tokens that an older policy sampled, by kind.\n" + kinds_described(CORRECTIONS),
    )

    max_staleness: int = Field(default=1, ge=0)
    """async: how many updates the policy that sampled a token may be behind the policy that trains on it; older groups
    are generated again"""
    lease_seconds: float = Field(default=120.0, gt=1.0, le=86400.0)
    """async: if the service hears nothing from the trainer for this many seconds, it hands the trainer's groups out
    again"""

    learning_rate: float = Field(default=1e-6, gt=0.0)
    """AdamW's learning rate, after the warm-up"""
    warmup_steps: int = Field(default=0, ge=0)
    """steps over which the learning rate rises linearly; then it is constant"""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """AdamW's weight decay"""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates"""
    max_grad_norm: float = Field(default=1.0, gt=0.0)
    """gradients are scaled down to this norm"""
    kl_coefficient: float = Field(default=0.0, ge=0.0)
    """weight of the KL divergence (k3 estimate) to the initial policy; with 0 the learner keeps no reference policy"""
    router_coefficient: float = Field(default=0.0, ge=0.0)
    """a policy with experts: weight of the load-balancing loss (Switch), which keeps routers from choosing few experts
    only; 0.001 to 0.01 are usual. The loss is between the number of experts that a token chooses, if all are chosen
    alike, and the number of all experts"""
    minibatches: int = Field(default=1, ge=1)
    """optimiser updates per epoch"""
    epochs: int = Field(default=1, ge=1)
    """passes over each step's rollouts"""
    max_tokens_per_microbatch: int = Field(default=16384, ge=1)
    """tokens in one forward pass, padding included; it changes memory and speed, not the gradient"""
    gradient_checkpointing: CliImplicitFlag[bool] = False
    """save memory by computing activations again in the backward pass; dropout stays off, as it does without this"""

    router_replay: CliImplicitFlag[bool] = False
    """for mixtures of experts: the routers choose the experts that the engine chose when it sampled (R3, arXiv
    2510.11370); needs `engine.routed_experts` of the service"""

    seed: int = Field(default=0, ge=0)
    """seed of sampling and of the order of minibatches"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype of the learner's matrix products; scores and losses are float32. auto: bfloat16 on a GPU or with weights in
    bfloat16, else float32"""
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the weights, their gradients and the optimiser's two moments. float32: 16 bytes a parameter; products in
    bfloat16 read the weights through copies of 2 bytes. bfloat16: 8 bytes a parameter, without copies, and checkpoints
    are bfloat16; an update below some 0.2 % of a weight is lost in rounding, so small learning rates have no effect"""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """the learner's device; auto: cuda if there is one, else cpu"""
    threads: Threads = 0
    """CPU threads of the learner; 0 for all"""

    reward_processes: int = Field(default_factory=one_with_async, ge=0)
    """processes that grade responses; with 0 the trainer's own process grades them, without a time limit; default: 1
    with async, 0 with sync"""
    reward_timeout: float = Field(default=60.0, gt=0.0)
    """seconds that a reward process may take for one reward; if it takes longer, the completion is left out"""

    evaluate_every: int = Field(default=10, ge=0)
    """steps between held-out evaluations, which also run before the first step and after the last; 0 for none"""
    evaluation_prompts: int = Field(default=64, ge=1, le=MAX_GROUPS)
    """number of held-out problems; every evaluation uses the same ones"""
    evaluation_completions: int = Field(default=1, ge=1, le=MAX_COMPLETIONS)
    """completions of each held-out problem"""

    losslessness_limit: float = Field(default=5.0, gt=0.0)
    """raise an alarm if the running z of all sampled tokens is this far from 0: the samples do not follow the policy"""
    losslessness_alarm: Literal["warn", "stop"] = "warn"
    """warn: print the alarm after every such step; stop: leave a checkpoint and end with exit code 1"""

    expert_limit: float = Field(default=0.01, ge=0.0, lt=1.0)
    """a policy with experts: raise an alarm if an expert is chosen for less than this part of an equal share of the
    tokens of the last 10 steps; 0 for no alarm"""
    expert_alarm: Literal["warn", "stop"] = "warn"
    """warn: print the alarm after every such step; stop: leave a checkpoint and end with exit code 1"""

    output: Path = Path("runs/rl")
    """folder of checkpoints, metrics, rollouts and plots"""
    resume: CliImplicitFlag[bool] = False
    """continue from the latest checkpoint in the output folder; if there is none, start a new run"""
    checkpoint_every: int = Field(default=10, ge=0)
    """steps between checkpoints; one is also written before the first step, after the last, and whenever the run ends;
    with 0 only these"""
    keep_checkpoints: int = Field(default=2, ge=1)
    """how many of the latest checkpoints are kept"""
    tensorboard: CliImplicitFlag[bool] = False
    """also write TensorBoard events"""
    record_rollouts: CliImplicitFlag[bool] = False
    """write every group to output/rollouts, for `replay`"""
    replay: Path | None = None
    """train on the groups recorded in this folder, without an endpoint"""

    @field_validator("betas")
    @classmethod
    def _decay_rates(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError("each must be at least 0 and below 1")
        return betas

    @field_validator("replay")
    @classmethod
    def _recorded(cls, replay: Path | None) -> Path | None:
        if replay is not None and not replay.is_dir():
            raise ValueError("no such folder")
        return replay

    @field_validator("minibatches")
    @classmethod
    def _enough_rollouts(cls, minibatches: int, info: Any) -> int:
        rollouts = info.data.get("prompts_per_step", 1) * info.data.get("completions", minibatches)
        if minibatches > rollouts:
            raise ValueError(f"more than the {rollouts} rollouts of a step")
        return minibatches

    @model_validator(mode="after")
    def _what_the_mode_takes(self) -> "TrainConfig":
        if self.mode == "async":
            if self.replay is not None:
                raise ValueError('replay: a recording cannot be replayed in mode "async"; use mode = "sync"')
            if self.reward_processes == 0:
                raise ValueError("reward_processes: asynchronous training needs at least 1")
        return self

    @model_validator(mode="after")
    def _what_is_read(self) -> "TrainConfig":
        if not self.loss.dynamic_sampling:
            self.refuse_unread(["dynamic_sampling_rounds"], "loss.dynamic_sampling = false")
        if self.expert_limit == 0.0:
            self.refuse_unread(["expert_alarm"], "expert_limit = 0")
        if self.reward_processes == 0:
            self.refuse_unread(["reward_timeout"], "reward_processes = 0, which has no time limit")
        return self

    @model_validator(mode="after")
    def _dtypes_fit(self) -> "TrainConfig":
        if self.weights_dtype == "bfloat16" and self.dtype == "float32":
            raise ValueError(
                'dtype: weights in bfloat16 are multiplied in bfloat16; leave it out, or set weights_dtype = "float32"'
            )
        return self

    @model_validator(mode="after")
    def _not_over_itself(self) -> "TrainConfig":
        if self.replay is not None and self.replay.resolve() == (self.output / "rollouts").resolve():
            raise ValueError("replay: this is the run's own output/rollouts; choose another output folder")
        return self

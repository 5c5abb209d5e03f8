"""TrainConfig: everything `rl-loop train` can be told. Imports no torch, so that `--help` and errors are immediate."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, FilePath, field_validator, model_validator
from pydantic_settings import CliImplicitFlag

from drafters.by_kind import kinds_described
from drafters.registry import KINDS, LearnerKindOrNone
from drafters.settings import Section, Threads
from drafters.training.config import OnlineTraining
from rl_loop.custom_function import PATH
from rl_loop.losses.correction_config import CORRECTIONS, AnyCorrection, Truncated
from rl_loop.losses.custom_loss import CustomLoss
from rl_loop.losses.grpo import GRPO
from rl_loop.losses.registry import LOSSES, AnyLoss
from rollout_service.protocol import (
    MAX_COMPLETIONS,
    MAX_GROUPS,
    Endpoint,
    ResponseTokens,
    Sampling,
    Temperature,
    TopK,
    TopP,
    WithToken,
)

TaskKind = Literal["reasoning_gym", "jsonl"]
Grader = Literal["auto", "math", "text", "choice"]


class TaskConfig(Section):
    """Where prompts come from and how responses are graded."""

    kind: TaskKind = "reasoning_gym"
    name: str = "chain_sum"
    """reasoning_gym: the dataset's name"""
    params: dict[str, Any] = Field(default_factory=dict)
    """reasoning_gym: the dataset's own parameters"""
    size: int = Field(default=1_000_000, ge=1)
    """reasoning_gym: problems of each split; training repeats after them"""
    path: FilePath | None = None
    """jsonl: file of prompts, one JSON object a line with `answer` and `prompt` (text or messages) or `messages`"""
    held_out_path: FilePath | None = None
    """jsonl: file of held-out prompts; without it the last tenth of `path` is held out"""
    seed: int = Field(default=0, ge=0)
    """which problems (reasoning_gym), or their order (jsonl)"""
    prompt_suffix: str = "\n"
    """appended to a prompt that is text"""
    chat: CliImplicitFlag[bool] = False
    """send the prompt as a chat message through the policy's chat template, instead of as text"""
    system_prompt: str | None = None
    """first message of a chat"""
    overlong: Literal["refuse", "skip"] = "refuse"
    """what becomes of a prompt that leaves no room for sampling.max_tokens in the served context: the run does not
    start, or goes without it; skipped ones are counted"""
    answer_pattern: str = r"Answer:\s*(.*)"
    """regular expression with one group; its last match in a response is the answer, else the whole response is"""
    grader: Grader = "auto"
    """jsonl: how an answer is compared: math (numbers and formulas, by their value), text (without case and punctuation
    around it), choice (by its letter); auto decides for each problem by its `answer`"""
    reward: str | None = None
    """own reward `package.module:function`, called with the response and the problem's entry; replaces the grading"""
    pass_threshold: float = 1.0
    """a response is right when its reward is at least this"""

    @field_validator("answer_pattern")
    @classmethod
    def _one_group(cls, pattern: str) -> str:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        if groups != 1:
            raise ValueError(f"must have exactly one group, has {groups}")
        return pattern

    @field_validator("reward")
    @classmethod
    def _module_and_function(cls, reward: str | None) -> str | None:
        if reward is not None and not PATH.fullmatch(reward):
            raise ValueError("must be package.module:function")
        return reward

    @model_validator(mode="after")
    def _is_read(self) -> "TaskConfig":
        of_kind = {"reasoning_gym": ("name", "params", "size"), "jsonl": ("path", "held_out_path", "grader")}
        self.refuse_unread([n for kind in of_kind if kind != self.kind for n in of_kind[kind]], f"kind = {self.kind!r}")
        if self.reward is not None:
            self.refuse_unread(["answer_pattern", "grader"], "reward, which grades by itself")
        if self.chat:
            self.refuse_unread(["prompt_suffix"], "chat = true")
        return self

    @model_validator(mode="after")
    def _has_prompts(self) -> "TaskConfig":
        if self.kind == "jsonl" and self.path is None:
            raise ValueError("path is needed for kind = jsonl")
        if self.system_prompt is not None and not self.chat:
            raise ValueError("system_prompt needs chat = true")
        return self


class SamplingConfig(Section):
    """How rollouts are drawn, in training and in evaluation."""

    temperature: Temperature = Field(default=1.0, gt=0.0)
    """above 0: a policy gradient needs samples"""
    top_p: TopP = 1.0
    """smallest set of tokens whose probabilities reach this"""
    top_k: TopK = 0
    """the k most likely tokens; 0 for all"""
    max_tokens: ResponseTokens = 256
    """longest response, in tokens"""

    def with_seed(self, seed: int) -> Sampling:
        return Sampling(**self.model_dump(), seed=seed)


class OnlineDrafterConfig(Section):
    """The service's drafter, trained along with the policy."""

    kind: LearnerKindOrNone = "none"
    """the kind that the service drafts with; none leaves its drafter alone"""
    model: str | None = None
    """the checkpoint that the service started with: a folder or a Hugging Face name; for a kind whose tensors live in
    the policy's checkpoint, that one when not given"""
    training: OnlineTraining = Field(default_factory=OnlineTraining)

    @model_validator(mode="after")
    def _has_checkpoint(self) -> "OnlineDrafterConfig":
        if KINDS[self.kind].has_folder and self.model is None:
            raise ValueError(f"model is needed for kind = {self.kind}")
        return self


def one_with_async(fields: dict[str, Any]) -> int:
    """Its name is what `--help` shows of the default."""
    return int(fields["mode"] == "async")


class TrainConfig(WithToken, Section):
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
    """sync: each step samples with the policy it trains; async: generation goes on while the policy is trained"""
    endpoint: Endpoint = "http://127.0.0.1:8000"
    """the rollout service"""
    ready_timeout: float = Field(default=600.0, ge=0.0)
    """seconds to wait until the service is ready"""
    take_over: CliImplicitFlag[bool] = False
    """take the service over from the run that its weights belong to; that run then ends with an error"""
    task: TaskConfig = Field(default_factory=TaskConfig)
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    online_drafter: OnlineDrafterConfig = Field(default_factory=OnlineDrafterConfig)

    steps: int = Field(default=100, ge=1)
    """steps of the whole run, those before a resume included"""
    prompts_per_step: int = Field(default=32, ge=1, le=MAX_GROUPS)
    """groups in a step"""
    completions: int = Field(default=8, ge=2, le=MAX_COMPLETIONS)
    """completions of a group; at least 2, since a reward counts relative to its group's others"""
    loss: AnyLoss = Field(
        default=GRPO(),
        description="The objective, by kind, with the defaults of its paper.\n"
        + kinds_described([*LOSSES, CustomLoss]),
    )
    dynamic_sampling_rounds: int = Field(default=10, ge=1)
    """with loss.dynamic_sampling, sync: a step that is not full after so many rounds is trained as it is"""
    correction: AnyCorrection = Field(
        default=Truncated(),
        description="For tokens that an older policy sampled than the one that is trained on them, by kind.\n"
        + kinds_described(CORRECTIONS),
    )

    max_staleness: int = Field(default=1, ge=0)
    """async: updates that a trained token's policy may be behind the one that is trained; older groups are generated
    again"""
    lease_seconds: float = Field(default=120.0, gt=1.0, le=86400.0)
    """async: a trainer that has not been heard of for so long loses its groups to the next one"""

    learning_rate: float = Field(default=1e-6, gt=0.0)
    warmup_steps: int = Field(default=0, ge=0)
    """steps over which the learning rate rises linearly; constant after them"""
    weight_decay: float = Field(default=0.0, ge=0.0)
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates"""
    max_grad_norm: float = Field(default=1.0, gt=0.0)
    """gradients are scaled down to this norm"""
    kl_coefficient: float = Field(default=0.0, ge=0.0)
    """weight of the KL divergence (k3 estimate) to the initial policy; 0 keeps no reference"""
    minibatches: int = Field(default=1, ge=1)
    """optimiser updates an epoch"""
    epochs: int = Field(default=1, ge=1)
    """times that a step's rollouts are trained on"""
    max_tokens_per_microbatch: int = Field(default=16384, ge=1)
    """padded tokens in one forward; changes memory and speed, not the gradient"""
    gradient_checkpointing: CliImplicitFlag[bool] = False
    """recompute activations in the backward, for memory; dropout and whatever else training mode turns on stay off, as
    they do without it"""

    seed: int = Field(default=0, ge=0)
    """of sampling and of the order of minibatches"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the learner's matrix products; weights and optimiser state are float32 always"""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """auto is cuda where there is one"""
    threads: Threads = 0
    """CPU threads of the learner; 0 for all"""

    reward_processes: int = Field(default_factory=one_with_async, ge=0)
    """processes that grade responses; 0 grades in the trainer's own, without a time limit; when not given 1 with async,
    else 0"""
    reward_timeout: float = Field(default=60.0, gt=0.0)
    """seconds one reward may take in such a process; a longer one costs its completion"""

    evaluate_every: int = Field(default=10, ge=0)
    """steps between held-out evaluations; also before the first and after the last step; 0 for none"""
    evaluation_prompts: int = Field(default=64, ge=1, le=MAX_GROUPS)
    """held-out problems, the same at every evaluation"""
    evaluation_completions: int = Field(default=1, ge=1, le=MAX_COMPLETIONS)
    """completions of each"""

    losslessness_limit: float = Field(default=5.0, gt=0.0)
    """alarm when the running z of all sampled tokens is this far from 0: what is sampled is not the policy then"""
    losslessness_alarm: Literal["warn", "stop"] = "warn"
    """warn: say so after every such step; stop: leave a checkpoint and end with exit code 1"""

    output: Path = Path("runs/rl")
    """folder of checkpoints, metrics, rollouts and plots"""
    resume: CliImplicitFlag[bool] = False
    """go on from the latest checkpoint in the output folder; start where there is none"""
    checkpoint_every: int = Field(default=10, ge=0)
    """steps between checkpoints; also before the first step, after the last one and when a run is ended; 0 for only
    those"""
    keep_checkpoints: int = Field(default=2, ge=1)
    """the latest ones"""
    tensorboard: CliImplicitFlag[bool] = False
    """also write TensorBoard events"""
    record_rollouts: CliImplicitFlag[bool] = False
    """write every group to output/rollouts, for `replay`"""
    replay: Path | None = None
    """train on the groups recorded in this folder, instead of asking the endpoint"""

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
                raise ValueError('replay: a recording holds no staleness; use mode = "sync"')
            if self.reward_processes == 0:
                raise ValueError("reward_processes: asynchronous training grades in processes of their own; at least 1")
        return self

    @model_validator(mode="after")
    def _what_is_read(self) -> "TrainConfig":
        if not self.loss.dynamic_sampling:
            self.refuse_unread(["dynamic_sampling_rounds"], "loss.dynamic_sampling = false")
        if self.reward_processes == 0:
            self.refuse_unread(["reward_timeout"], "reward_processes = 0, which has no time limit")
        return self

    @model_validator(mode="after")
    def _not_over_itself(self) -> "TrainConfig":
        if self.replay is not None and self.replay.resolve() == (self.output / "rollouts").resolve():
            raise ValueError("replay reads output/rollouts: choose another output folder")
        return self

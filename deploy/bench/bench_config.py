"""BenchConfig: which items are measured, on what, and how long."""

from pathlib import Path
from typing import Literal

from padding import Shape
from pydantic import Field

from drafters.drafter import DraftSampling
from drafters.registry import DrafterConfig
from drafters.settings import Section
from rollout_service.config import EngineConfig, ServiceConfig

Item = Literal["rollout_speed", "rollout_batch", "step", "service", "weights", "learner", "start"]

DrafterKind = Literal["mtp", "eagle3", "draft_model"]


class RolloutSpeed(Section):
    """Speed against no drafter at fixed numbers of streams, calibrated and with a fixed draft length."""

    streams: list[int] = Field(default=[1, 4, 16, 32, 64], min_length=1)
    response_tokens: int = Field(default=72, ge=1)
    """length of every response; half of the prompts have responses that long"""
    responses_per_stream: int = Field(default=2, ge=1)
    """in each round: few in many rounds, so that arms take turns within seconds, in which the machine's speed stays"""
    responses: int = Field(default=8, ge=1)
    """in each round, at least: of a stream or two more than `responses_per_stream`, whose acceptance says too little"""
    fixed: int = Field(default=3, ge=1)
    """the draft length of the arm that is not calibrated"""
    rounds: int = Field(default=20, ge=1)
    calibration_rounds: int = Field(default=6, ge=1)


class RolloutBatch(Section):
    """Wall-clock to the last of a batch's completions, whose lengths have a long tail."""

    completions: int = Field(default=64, ge=1)
    slots: int = Field(default=32, ge=1)
    """max_num_seqs of the engine"""
    median_tokens: float = Field(default=24.0, gt=0)
    sigma: float = Field(default=0.9, gt=0)
    """of the logarithm of the lengths, which are normal"""
    longest: int = Field(default=128, ge=1)
    """some of these go on past their end, where drafters have learned nothing; much longer ones would do so mostly"""
    rounds: int = Field(default=5, ge=1)


class Service(Section):
    """The service over HTTP and Ray against vLLM's LLM.generate in one process."""

    streams: int = Field(default=64, ge=1)
    response_tokens: int = Field(default=72, ge=1)
    responses_per_stream: int = Field(default=2, ge=1)
    rounds: int = Field(default=7, ge=1)


class Weights(Section):
    """A push, from the learner's tensors to the first token of the new version."""

    rounds: int = Field(default=7, ge=1)
    running: int = Field(default=8, ge=1)
    """completions under way during a push"""


class LearnerSpeed(Section):
    """The learner's passes against a plain loop over padded batches."""

    model: str = "deploy/demo/models/policy"
    rollouts: int = Field(default=128, ge=1)
    completions: int = Field(default=8, ge=1)
    """of each prompt, as in TrainConfig"""
    batch_rows: int = Field(default=16, ge=1)
    """of the plain loop"""
    rounds: int = Field(default=5, ge=1)


class Start(Section):
    """`rollout-service launch` to ready, with the demo's configuration."""

    config: Path = Path("deploy/demo/service.toml")
    rounds: int = Field(default=3, ge=1)


class Step(Section):
    """Whole training steps, with and without speculation: synchronous with each number of slots, asynchronous with the
    most."""

    service: Path = Path("deploy/demo/service.toml")
    train: Path = Path("deploy/demo/train.toml")
    slots: list[int] = Field(default=[64, 8], min_length=1)
    """max_num_seqs of the engine: the fewer, the more of a step is generation"""
    steps: int = Field(default=4, ge=2)
    """of each run; the first, which warms up, is left out"""
    runs: int = Field(default=2, ge=1)
    """of each arm, alternating"""
    flags: list[str] = Field(default_factory=list)
    """more flags of `rl-loop train`"""


class BenchConfig(Section):
    """Measure the service's speed: ratios within one run, arms in turns, medians with 95 % intervals."""

    only: list[Item] = Field(
        default=["rollout_speed", "rollout_batch", "service", "weights", "learner", "start", "step"], min_length=1
    )
    """items to measure; the table also shows what other runs left in `output`"""
    source: Path = Path("deploy/demo/models")
    """the demo's policy, eagle3 and draft_model"""
    padded: Path = Path("runs/padded")
    """folder of the same, padded (deploy/bench/padding.py); made when it is not there, or of another shape"""
    shape: Shape = Shape()
    """what the policy is padded to"""
    prompts: Path = Path("deploy/demo/prompts.jsonl")
    drafters: list[Literal["mtp", "eagle3", "draft_model"]] = Field(
        default=["mtp", "eagle3", "draft_model"], min_length=1
    )
    """the first is the one of service and weights"""
    draft_tokens: int = Field(default=5, ge=1, le=16)
    """the longest draft"""
    draft_sampling: DraftSampling = "greedy"
    """as in DrafterConfig; the demo's policy is nearly certain of most tokens, so that the most likely one is accepted
    more often than a sampled one"""
    engine: EngineConfig = EngineConfig(dtype="bfloat16", max_model_len=512, max_num_seqs=64, kv_cache_gib=1.0)
    output: Path = Path("deploy/bench/results")
    rollout_speed: RolloutSpeed = RolloutSpeed()
    rollout_batch: RolloutBatch = RolloutBatch()
    service: Service = Service()
    weights: Weights = Weights()
    learner: LearnerSpeed = LearnerSpeed()
    start: Start = Start()
    step: Step = Step()

    @property
    def policy(self) -> str:
        return str(self.padded / "policy")

    def drafter(self, kind: str, **more: object) -> DrafterConfig:
        """A padded drafter."""
        model = str(self.padded / kind) if kind in ("eagle3", "draft_model") else None
        return DrafterConfig.model_validate(
            {
                "kind": kind,
                "model": model,
                "draft_tokens": self.draft_tokens,
                "draft_sampling": self.draft_sampling,
                **more,
            }
        )

    def served(self, drafter: DrafterConfig, **engine: object) -> ServiceConfig:
        return ServiceConfig(model=self.policy, engine=self.engine.model_copy(update=engine), drafter=drafter)

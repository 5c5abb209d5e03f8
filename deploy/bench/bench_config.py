"""BenchConfig: the items to measure, the models to measure them on, and the number of rounds."""

from pathlib import Path
from typing import Literal

from padding import Shape
from pydantic import Field

from drafters.drafter import DraftSampling
from drafters.registry import DrafterConfig
from drafters.settings import Section
from rollout_service.config import EngineConfig, ServiceConfig

Item = Literal["rollout_speed", "rollout_batch", "step", "service", "routes", "weights", "learner", "start"]

DrafterKind = Literal["mtp", "eagle3", "draft_model"]


class RolloutSpeed(Section):
    """Speed relative to no drafter by number of streams, with the calibrated schedule and with a fixed length."""

    streams: list[int] = Field(default=[1, 4, 16, 32, 64], min_length=1)
    response_tokens: int = Field(default=72, ge=1)
    """length of every response; half of the demo's prompts have responses of this length or more"""
    responses_per_stream: int = Field(default=2, ge=1)
    """responses of each stream in a round; few, so that the arms take turns within seconds and meet the same machine"""
    responses: int = Field(default=8, ge=1)
    """least number of responses in a round; with one or two streams, `responses_per_stream` alone would be too few to
    measure acceptance"""
    fixed: int = Field(default=3, ge=1)
    """the draft length of the arm with a fixed length"""
    rounds: int = Field(default=20, ge=1)
    calibration_rounds: int = Field(default=6, ge=1)


class RolloutBatch(Section):
    """Wall-clock time until the last completion of a batch ends. Lengths have a long tail."""

    completions: int = Field(default=64, ge=1)
    slots: int = Field(default=32, ge=1)
    """max_num_seqs of the engine"""
    median_tokens: float = Field(default=24.0, gt=0)
    sigma: float = Field(default=0.9, gt=0)
    """standard deviation of the logarithm of the lengths, which is normally distributed"""
    longest: int = Field(default=128, ge=1)
    """longest completion. Completions go on past the policy's end of text, where drafters have learned nothing. A
    higher limit would measure mostly that"""
    rounds: int = Field(default=5, ge=1)


class Service(Section):
    """The service over HTTP and Ray, against vLLM's LLM.generate in one process."""

    streams: int = Field(default=64, ge=1)
    response_tokens: int = Field(default=72, ge=1)
    responses_per_stream: int = Field(default=2, ge=1)
    rounds: int = Field(default=7, ge=1)


class Routes(Section):
    """The routes of single requests, against /v1/rollouts and stock vLLM's server."""

    routes: list[Literal["completions", "chat", "generate"]] = Field(
        default=["completions", "chat", "generate"], min_length=1
    )
    concurrent: list[int] = Field(default=[1, 16, 64], min_length=1)
    concurrent_when_busy: list[int] = Field(default=[16], min_length=1)
    """the same in one wave, while another process keeps one core busy; the engine has one core fewer, or
    `engine.cores`"""
    response_tokens: int = Field(default=72, ge=1)
    waves: int = Field(default=3, ge=1)
    """waves of concurrent requests, of each arm in a round; fewer, at least one, where they would have more than
    `most_requests`"""
    most_requests: int = Field(default=64, ge=1)
    rounds: int = Field(default=8, ge=1)


class Weights(Section):
    """Time of a push, from the learner's tensors to the first token of the new version."""

    rounds: int = Field(default=7, ge=1)
    running: int = Field(default=8, ge=1)
    """completions that run during a push"""


class LearnerSpeed(Section):
    """Speed of the learner's passes, against a plain loop over padded batches."""

    model: str = "deploy/demo/models/policy"
    rollouts: int = Field(default=128, ge=1)
    completions: int = Field(default=8, ge=1)
    """completions of each prompt, as in TrainConfig"""
    batch_rows: int = Field(default=16, ge=1)
    """rollouts in a batch of the plain loop"""
    rounds: int = Field(default=5, ge=1)


class Start(Section):
    """Time from `rollout-service launch` to a ready service, with the demo's configuration."""

    config: Path = Path("deploy/demo/service.toml")
    rounds: int = Field(default=3, ge=1)


class Step(Section):
    """Time of whole training steps with and without speculation.

    Synchronous steps are measured with each number of slots, asynchronous ones with the largest.
    """

    service: Path = Path("deploy/demo/service.toml")
    train: Path = Path("deploy/demo/train.toml")
    slots: list[int] = Field(default=[64, 8], min_length=1)
    """max_num_seqs of the engine; with fewer slots, generation takes more of a step"""
    steps: int = Field(default=4, ge=2)
    """steps of each run; the first step warms up and is not counted"""
    runs: int = Field(default=2, ge=1)
    """runs of each arm; the arms alternate"""
    flags: list[str] = Field(default_factory=list)
    """further flags of `rl-loop train`"""


class BenchConfig(Section):
    """Measure the service's speed. Ratios are within one run, in which arms take turns; medians have 95 % intervals."""

    only: list[Item] = Field(
        default=["rollout_speed", "rollout_batch", "service", "routes", "weights", "learner", "start", "step"],
        min_length=1,
    )
    """items to measure; the table also shows items that earlier runs left in `output`"""
    source: Path = Path("deploy/demo/models")
    """folder with the demo's policy, eagle3 and draft_model"""
    padded: Path = Path("runs/padded")
    """folder of the padded models (deploy/bench/padding.py); written if it is missing or has another shape"""
    shape: Shape = Shape()
    """shape of the padded policy"""
    prompts: Path = Path("deploy/demo/prompts.jsonl")
    drafters: list[Literal["mtp", "eagle3", "draft_model"]] = Field(
        default=["mtp", "eagle3", "draft_model"], min_length=1
    )
    """drafters to measure; item service uses the first one"""
    draft_tokens: int = Field(default=5, ge=1, le=16)
    """the longest draft"""
    draft_sampling: DraftSampling = "greedy"
    """as in DrafterConfig; the demo's policy is nearly certain of most tokens, so it accepts the most likely token more
    often than a sampled one"""
    engine: EngineConfig = EngineConfig(dtype="bfloat16", max_model_len=512, max_num_seqs=64, kv_cache_gib=1.0)
    output: Path = Path("deploy/bench/results")
    rollout_speed: RolloutSpeed = RolloutSpeed()
    rollout_batch: RolloutBatch = RolloutBatch()
    service: Service = Service()
    routes: Routes = Routes()
    weights: Weights = Weights()
    learner: LearnerSpeed = LearnerSpeed()
    start: Start = Start()
    step: Step = Step()

    @property
    def policy(self) -> str:
        return str(self.padded / "policy")

    def drafter(self, kind: str, **more: object) -> DrafterConfig:
        """The configuration of a padded drafter."""
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

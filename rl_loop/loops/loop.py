"""TrainingLoop: a training step in either mode, and the checkpoint after it.

before the batch      sync publishes the policy; both modes evaluate when it is due
batch                 graded groups
prepare               scores, advantages, examples; the drafter learns
train, count, report  no signal interrupts these: policy, optimiser, state and metrics change together
after the step        async publishes the drafter and reports an evaluation; then alarms and a checkpoint, if due
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rl_loop.config import TrainConfig
from rl_loop.learner.online_drafter import OnlineDrafter
from rl_loop.learner.policy_learner import PolicyLearner
from rl_loop.loops.collapsed_experts import check_experts
from rl_loop.loops.interruption import Interruption
from rl_loop.loops.losslessness_alarm import check_losslessness
from rl_loop.loops.sources import RolloutSource
from rl_loop.loops.step import StageClock, StepBatch, prepare, report_drafter, step_metrics
from rl_loop.reports.metrics import Overlap
from rl_loop.reports.reporting import Reporter
from rl_loop.run.checkpoint import RunState, checkpoint_folder, prune_checkpoints, save_checkpoint
from rl_loop.tasks import Task
from rl_loop.tasks.rewards import Rewards


@dataclass(eq=False)
class TrainingLoop(ABC):
    config: TrainConfig
    task: Task
    learner: PolicyLearner
    tokenizer: PreTrainedTokenizerBase
    source: RolloutSource
    rewards: Rewards
    reporter: Reporter
    state: RunState = field(default_factory=RunState)
    interruption: Interruption = field(default_factory=Interruption)
    drafter: OnlineDrafter | None = None

    def __post_init__(self) -> None:
        self.version = self.state.version
        """version of the policy that the current step trains"""

    @abstractmethod
    def run(self) -> None:
        """Train from the state's step to the last one. Write a checkpoint before the first step and after the last."""

    def save(self) -> Path:
        """Write the checkpoint of the last finished step, unless it exists. Returns its folder."""
        folder = checkpoint_folder(self.config.output, self.state.step)
        if not folder.exists():
            with self.interruption.deferred():
                self.reporter.stage("checkpoint")
                save_checkpoint(folder, self.learner, self.tokenizer, self.state, self.drafter)
                prune_checkpoints(self.config.output, self.config.keep_checkpoints)
        return folder

    def _step(self) -> None:
        config, state = self.config, self.state
        clock = StageClock(self.reporter.stage)
        self._before_batch(clock)
        batch = self._next_batch(clock)
        prepared = prepare(config, self.learner, batch.graded, self.version, clock, self.drafter, state.step)
        overlap = self._overlap(clock.seconds["generation"])
        with self.interruption.deferred():
            with clock("train"):
                update = self.learner.train(prepared.examples, step=state.step)
            after = RunState(
                step=state.step + 1,
                version=prepared.version,
                run=state.run,
                losslessness=state.losslessness + prepared.on_policy,
            )
            self._count(batch, after)
            self.state = after
            self._after_update(batch, clock)
            self.reporter.step(step_metrics(config, prepared, batch, update, clock, overlap, self.state))
            report_drafter(self.drafter, prepared, self.state.step, self.reporter)
        self._after_step()
        check_losslessness(config, self.state.losslessness, self.state.step, self.reporter.alarm)
        check_experts(config, self.reporter.log.steps, self.reporter.alarm)
        if config.checkpoint_every and self.state.step % config.checkpoint_every == 0:
            self.save()

    @property
    def _is_evaluation_due(self) -> bool:
        return bool(self.config.evaluate_every) and self.state.step % self.config.evaluate_every == 0

    def _publish_drafter(self) -> None:
        """Push the drafter, unless the engines hold it."""
        if self.drafter is not None:
            self.drafter.publish(self.source.publisher.publish)

    @abstractmethod
    def _before_batch(self, clock: StageClock) -> None:
        """Set `version`, and do what the mode does first."""

    @abstractmethod
    def _next_batch(self, clock: StageClock) -> StepBatch:
        """The step's groups. There is at least one."""

    def _overlap(self, waited: float) -> Overlap:
        """`waited`: seconds that the learner waited for the batch."""
        return Overlap(exposed_generation=waited, learner_idle=waited)

    @abstractmethod
    def _count(self, batch: StepBatch, after: RunState) -> None:
        """Write into `after`, the state after the step, what the run has drawn and pushed."""

    @abstractmethod
    def _after_update(self, batch: StepBatch, clock: StageClock) -> None:
        """Do what must happen together with the update."""

    @abstractmethod
    def _after_step(self) -> None:
        """Do what a signal may interrupt."""

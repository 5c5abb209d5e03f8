"""The synchronous loop: every step samples with the policy that it then trains.

      task                      source, publisher (the rollout service)     learner
       |                              |                                        |
       |  prepare     weights, version N  <------------------------------ export, also the drafter's
       |  data        problems -> group requests                               |
       |------------------------------>                                        |
       |  generation  groups, each as it finishes                              |
       <------------------------------|                                        |
       |  rewards                                                              |
       |  logprob     trainer's log-probabilities, entropy, z  <---------------|  (the drafter learns here)
       |  data        advantages                                               |
       |  train       clipped loss, AdamW  ------------------------------------> policy N+1

- A policy is published before it samples: at the start of every step, including the first and the first after a resume.
  So it does not matter which weights the service started with, or whether it was restarted.
- Held-out evaluation comes before a step's generation and uses the same policy. A checkpoint is written at the end of a
  step, so none lies between an evaluation and the generation that follows it.
- A step changes the policy, the optimiser, the state and the metrics in one section that no signal interrupts.
"""

from collections.abc import Sequence

from rl_loop.loops.evaluation import evaluate, generate_graded
from rl_loop.loops.loop import TrainingLoop
from rl_loop.loops.prompts import group_requests
from rl_loop.loops.step import StageClock, StepBatch, rewards_differ
from rl_loop.reports.metrics import GradedGroup
from rl_loop.run.checkpoint import RunState
from rl_loop.tasks import TaskProblem
from rl_loop.tasks.rewards import LostGroups
from rollout_service.protocol import GroupRequest


class SynchronousLoop(TrainingLoop):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.lost = LostGroups(self.config.prompts_per_step)
        self.is_published = False

    def run(self) -> None:
        self.save()
        while self.state.step < self.config.steps:
            self._step()
        self._publish()  # the service goes on with the policy that the run ended with
        if self.config.evaluate_every:
            self._evaluate()
        self.save()

    def _before_batch(self, clock: StageClock) -> None:
        with clock("prepare"):
            self._publish()
        if self._is_evaluation_due:
            clock.leave_out(self._evaluate())

    def _publish(self) -> None:
        """Let the source sample from the learner's policy, unless it already does."""
        if not self.is_published:
            self.version = self.source.publisher.publish("policy", self.learner.export, self.version)
            self.is_published = True
        self._publish_drafter()

    def _evaluate(self) -> float:
        """Evaluate, and return the seconds that it took."""
        self.reporter.stage("evaluation")
        metrics = evaluate(self.config, self.task, self._generate, self.rewards, self.state.step, self.version)
        self.reporter.evaluation(metrics)
        return metrics.seconds

    def _next_batch(self, clock: StageClock) -> StepBatch:
        """Draw rounds of prompts until there is a group, and with dynamic sampling until the rewards of enough groups
        differ. Raises RewardsFailed."""
        config, state = self.config, self.state
        graded: list[GradedGroup] = []
        latest: list[GradedGroup] = []
        rounds = replaced = failed = rewards_failed = 0
        while True:
            with clock("data"):
                first = state.position + rounds * config.prompts_per_step
                indices = range(first, first + config.prompts_per_step)
                problems = {index: self.task.prompt("train", index) for index in indices}
                name = f"train-{state.step + 1:06d}" + (f"-{rounds + 1}" if rounds else "")
                requests = group_requests(config, name, "train", problems, config.completions, seed_by=name)
            with clock("generation"):
                generated = self._generate(name, requests, list(problems.values()))
                arrived = [g for g in generated if self.lost.keep(g, self.rewards.last_failure)]
            kept = [g for g in arrived if rewards_differ(g) or not config.loss.dynamic_sampling]
            rounds += 1
            failed += len(requests) - len(generated)
            rewards_failed += sum(g.failed for g in generated)
            replaced += len(arrived) - len(kept)
            graded += kept
            latest = arrived or latest
            is_last = not config.loss.dynamic_sampling or rounds >= config.dynamic_sampling_rounds
            if len(graded) >= config.prompts_per_step or (is_last and latest):
                return StepBatch(
                    graded[: config.prompts_per_step] or latest, rounds, replaced=replaced, failed=failed,
                    rewards_failed=rewards_failed,
                )  # fmt: skip

    def _generate(
        self, batch: str, requests: Sequence[GroupRequest], problems: Sequence[TaskProblem]
    ) -> list[GradedGroup]:
        with self.reporter.groups(len(requests)) as advance:
            return generate_graded(self.source, self.rewards, batch, requests, problems, advance)

    def _count(self, batch: StepBatch, after: RunState) -> None:
        after.position = self.state.position + batch.rounds * self.config.prompts_per_step
        after.pushed = [self.version]

    def _after_update(self, batch: StepBatch, clock: StageClock) -> None:
        self.is_published = False

    def _after_step(self) -> None:
        """Nothing: the next step publishes."""

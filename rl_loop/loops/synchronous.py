"""The synchronous loop: every step samples with the policy it then trains.

      task                      source (the rollout service)                learner
       |                              |                                        |
       |  prepare     weights, version N  <------------------------------ checkpoint_tensors, and the drafter's
       |  data        problems -> group requests                               |
       |------------------------------>                                        |
       |  generation  groups, each as it finishes                              |
       <------------------------------|                                        |
       |  rewards                                                              |
       |  logprob     trainer's log-probabilities, entropy, z  <---------------|  (the drafter learns here)
       |  data        advantages                                               |
       |  train       clipped loss, AdamW  ------------------------------------> policy N+1

- A policy is published before it samples: at the start of a step, of the first one too, and after a resume. So what
  the service started with, and whether it was restarted, does not matter.
- Held-out evaluation comes before a step's generation, with the same policy; so a checkpoint, which is written at the
  end of a step, never lies between an evaluation and what follows from it.
- What a step changes (policy, optimiser, state, metrics) changes within one section that a signal does not cut.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rl_loop.config import TrainConfig
from rl_loop.learner.online_drafter import OnlineDrafter
from rl_loop.learner.policy_learner import Learner
from rl_loop.loops.interruption import Interruption
from rl_loop.loops.losslessness_alarm import check_losslessness
from rl_loop.loops.prompts import group_requests
from rl_loop.loops.sources import RolloutSource, delivered
from rl_loop.loops.step import StageClock, prepare, report_drafter, step_metrics, teaches
from rl_loop.reports.metrics import EvaluationMetrics, GradedGroup, Overlap, rollout_metrics
from rl_loop.reports.reporting import Reporter
from rl_loop.run.checkpoint import RunState, checkpoint_folder, prune_checkpoints, save_checkpoint
from rl_loop.tasks import Split, Task, TaskProblem
from rl_loop.tasks.rewards import LostGroups, RewardsHere, check_evaluation
from rl_loop.tasks.rewards_pool import RewardsPool
from rollout_service.protocol import Group, GroupRequest


class SynchronousLoop:
    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        learner: Learner,
        tokenizer: PreTrainedTokenizerBase,
        source: RolloutSource,
        reporter: Reporter,
        state: RunState | None = None,
        interruption: Interruption | None = None,
        pool: RewardsPool | None = None,
        drafter: OnlineDrafter | None = None,
    ):
        """`pool` grades in processes of their own; without it rewards are had in this one. What a failed one costs is
        said in rl_loop/tasks/rewards.py."""
        self.config, self.task, self.learner, self.tokenizer = config, task, learner, tokenizer
        self.source, self.reporter = source, reporter
        self.rewards = pool or RewardsHere(task)
        self.lost = LostGroups(config.prompts_per_step)
        self.state = state or RunState()
        self.interruption = interruption or Interruption()
        self.drafter = drafter
        self.version = self.state.version
        self.is_published = False

    def run(self) -> None:
        """From the state's step to the last one; leaves a checkpoint of it, and before the first step one of step 0."""
        self.save()
        while self.state.step < self.config.steps:
            self._step()
            check_losslessness(self.config, self.state.losslessness, self.state.step, self.reporter.alarm)
            if self.config.checkpoint_every and self.state.step % self.config.checkpoint_every == 0:
                self.save()
        if self.config.evaluate_every:
            self._publish()
            self._evaluate()
        self.save()

    def save(self) -> Path:
        """The checkpoint of the last finished step; written unless it is there."""
        folder = checkpoint_folder(self.config.output, self.state.step)
        if not folder.exists():
            with self.interruption.deferred():
                self.reporter.stage("checkpoint")
                save_checkpoint(folder, self.learner, self.tokenizer, self.state, self.drafter)
                prune_checkpoints(self.config.output, self.config.keep_checkpoints)
        return folder

    def _step(self) -> None:
        config, state = self.config, self.state
        clock, started = StageClock(self.reporter.stage), time.perf_counter()
        with clock("prepare"):
            self._publish()
        if config.evaluate_every and state.step % config.evaluate_every == 0:
            started += self._evaluate().seconds  # an evaluation is no part of the step
        graded, replaced = self._batch(clock)
        overlap = Overlap(exposed_generation=clock.seconds["generation"], learner_idle=clock.seconds["generation"])
        prepared = prepare(config, self.learner, graded, self.version, clock, self.drafter, state.step)
        with self.interruption.deferred():
            with clock("train"):
                update = self.learner.train(prepared.examples, step=state.step)
            self.is_published = False
            self.state = RunState(
                step=state.step + 1,
                position=state.position + (1 + replaced.rounds) * config.prompts_per_step,
                version=self.version,
                run=state.run,
                pushed=[self.version],
                losslessness=state.losslessness + prepared.on_policy,
            )
            self.reporter.step(
                step_metrics(
                    config, prepared, update, clock, overlap, step=self.state.step,
                    losslessness=self.state.losslessness, groups_replaced=replaced.groups,
                    groups_failed=replaced.failed, rewards_failed=replaced.rewards,
                    seconds=time.perf_counter() - started,
                )
            )  # fmt: skip
            report_drafter(self.drafter, prepared, self.state.step, self.reporter)

    def _batch(self, clock: StageClock) -> tuple[list[GradedGroup], "Replaced"]:
        """The step's graded groups: at least one. Further rounds of prompts are drawn until there is one, and with
        dynamic sampling until enough of them teach. Raises RewardsFailed."""
        config, state = self.config, self.state
        graded: list[GradedGroup] = []
        latest: list[GradedGroup] = []
        replaced = Replaced()
        while True:
            with clock("data"):
                first = state.position + replaced.rounds * config.prompts_per_step
                problems = self._problems("train", range(first, first + config.prompts_per_step))
                batch = f"train-{state.step + 1:06d}" + (f"-{replaced.rounds + 1}" if replaced.rounds else "")
                requests = group_requests(config, batch, "train", problems, config.completions, seed_by=batch)
            with clock("generation"):
                generated = self._generate(batch, requests, list(problems.values()))
                replaced.failed += len(requests) - len(generated)
                replaced.rewards += sum(g.failed for g in generated)
                arrived = [g for g in generated if self.lost.keep(g, self.rewards.last_failure)]
                latest = arrived or latest
            teaching = [g for g in arrived if teaches(g) or not config.loss.dynamic_sampling]
            graded += teaching
            replaced.groups += len(arrived) - len(teaching)
            is_last = not config.loss.dynamic_sampling or replaced.rounds + 1 >= config.dynamic_sampling_rounds
            if len(graded) >= config.prompts_per_step or (is_last and latest):
                return graded[: config.prompts_per_step] or latest, replaced
            replaced.rounds += 1

    def _publish(self) -> None:
        """Let the source sample from the learner's policy, unless it does."""
        if not self.is_published:
            self.version = self.source.publish(self.learner.checkpoint_tensors, self.version)
            self.is_published = True
        if self.drafter is not None:
            self.drafter.publish(self.source.publish_drafter)

    def _evaluate(self) -> EvaluationMetrics:
        """The same held-out problems with the same seeds each time."""
        started = time.perf_counter()
        self.reporter.stage("evaluation")
        problems = self._problems("held_out", range(self.config.evaluation_prompts))
        batch = f"held_out-{self.state.step:06d}"
        completions = self.config.evaluation_completions
        requests = group_requests(self.config, batch, "held_out", problems, completions, seed_by="held_out")
        graded = self._generate(batch, requests, list(problems.values()))
        check_evaluation(graded, self.rewards.last_failure)
        metrics = EvaluationMetrics(
            **rollout_metrics(graded, self.config.task.pass_threshold).model_dump(),
            step=self.state.step,
            version=self.version,
            seconds=time.perf_counter() - started,
        )
        self.reporter.evaluation(metrics)
        return metrics

    def _problems(self, split: Split, indices: range) -> dict[int, TaskProblem]:
        return {index: self.task.prompt(split, index) for index in indices}

    def _generate(
        self, batch: str, requests: Sequence[GroupRequest], problems: Sequence[TaskProblem]
    ) -> list[GradedGroup]:
        """The graded groups without those that failed, in the order of the requests; each is graded when it arrives."""
        problem_of = {request.id: problem for request, problem in zip(requests, problems, strict=True)}
        arrived: dict[str, tuple[Group, list[Future[float | None]]]] = {}
        with self.reporter.groups(len(requests)) as advance, closing(self.source.rollouts(batch, requests)) as groups:
            for group in delivered(groups):
                rewards = self.rewards.submit(problem_of[group.id], [c.text for c in group.completions])
                arrived[group.id] = group, rewards
                advance()
        in_order = [arrived[str(request.id)] for request in requests if request.id in arrived]
        return [GradedGroup.of(group, [reward.result() for reward in rewards]) for group, rewards in in_order]


@dataclass
class Replaced:
    """What a step needed besides one round: rounds beyond the first, groups that dynamic sampling left out, `failed`
    groups that the service could not generate, and `rewards` that failed."""

    rounds: int = 0
    groups: int = 0
    failed: int = 0
    rewards: int = 0

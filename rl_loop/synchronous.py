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

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from drafters.scoring import SurprisalSums, join_scores
from rl_loop.advantages import group_advantages
from rl_loop.checkpoint import RunState, checkpoint_folder, prune_checkpoints, save_checkpoint
from rl_loop.config import TrainConfig
from rl_loop.drafter_metrics import drafter_metrics
from rl_loop.interruption import Interruption
from rl_loop.learner import Example, Learner
from rl_loop.metrics import (
    STAGES,
    EvaluationMetrics,
    GradedGroup,
    Stage,
    StepMetrics,
    mismatch_metrics,
    rollout_metrics,
)
from rl_loop.online_drafter import OnlineDrafter, learning_drafter
from rl_loop.reporting import Reporter
from rl_loop.sources import RolloutSource
from rl_loop.tasks import Problem, Split, Task
from rollout_service.protocol import MAX_COMPLETIONS, Group, GroupRequest


def sampling_seed(seed: int, what: str, index: int) -> int:
    """A group's seed; its completions draw with this and the numbers after it, all below 2^31."""
    digest = hashlib.blake2b(f"{seed} {what} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % (2**31 - MAX_COMPLETIONS)


class StageClock:
    """Seconds by stage. `announce` is told each stage that begins."""

    def __init__(self, announce: Callable[[str], None]):
        self.announce = announce
        self.seconds: dict[Stage, float] = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def __call__(self, stage: Stage) -> Iterator[None]:
        self.announce(stage)
        started = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - started


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
        drafter: OnlineDrafter | None = None,
    ):
        self.config, self.task, self.learner, self.tokenizer = config, task, learner, tokenizer
        self.source, self.reporter = source, reporter
        self.state = state or RunState()
        self.interruption = interruption or Interruption()
        self.drafter = drafter
        self.version = self.state.version
        self.is_published = False

    def run(self) -> None:
        """From the state's step to the last one; leaves a checkpoint of it."""
        while self.state.step < self.config.steps:
            self._step()
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
        with clock("data"):
            indices = range(state.position, state.position + config.prompts_per_step)
            problems = self._problems("train", indices)
            batch = f"train-{state.step + 1:06d}"
            requests = self._requests(batch, "train", problems, config.completions, seed_by=batch)
        with clock("generation"):
            graded = self._generate(batch, requests, list(problems.values()))
        with clock("logprob"):
            rollouts = [rollout for g in graded for rollout in g.rollouts]
            completions = [completion for g in graded for completion in g.group.completions]
            with learning_drafter(self.drafter, self.learner.policy, state.step, completions) as (learned, after):
                scores = self.learner.logprobs(rollouts, after)
            references = self.learner.reference_logprobs(rollouts)
        with clock("data"):
            advantages = group_advantages([g.rewards for g in graded], config.normalise_advantages)
            per_rollout = [value for group in advantages.values for value in group]
            old = [score.logprobs for score in scores]
            examples = list(map(Example, rollouts, per_rollout, old, references))
        with self.interruption.deferred():
            with clock("train"):
                update = self.learner.train(examples, step=state.step)
            self.is_published = False
            all_scores = join_scores(scores)
            sums = SurprisalSums.of(all_scores)
            self.state = RunState(
                step=state.step + 1,
                position=indices.stop,
                version=self.version,
                losslessness=state.losslessness + sums,
            )
            of_rollouts = rollout_metrics(graded, config.task.pass_threshold)
            self.reporter.step(
                StepMetrics(
                    **of_rollouts.model_dump(),
                    **mismatch_metrics(rollouts, all_scores).model_dump(),
                    **asdict(update),
                    step=self.state.step,
                    version=self.version,
                    zero_variance_groups=advantages.zero_variance_groups,
                    entropy=all_scores.entropy.mean().item(),
                    z=sums.z,
                    z_running=self.state.losslessness.z,
                    tokens_per_second=of_rollouts.tokens / clock.seconds["generation"],
                    stages=clock.seconds,
                    seconds=time.perf_counter() - started,
                )
            )
            if self.drafter is not None:
                self.drafter.finish_step()
            self.reporter.drafter(
                drafter_metrics(self.reporter.log.drafter, graded, self.state.step, self.version, learned)
            )

    def _publish(self) -> None:
        """Let the source sample from the learner's policy, unless it does."""
        if not self.is_published:
            self.version = self.source.publish(self.learner.checkpoint_tensors, self.version)
            self.is_published = True
        if self.drafter is not None:
            self.drafter.publish(self.source)

    def _evaluate(self) -> EvaluationMetrics:
        """The same held-out problems with the same seeds each time."""
        started = time.perf_counter()
        self.reporter.stage("evaluation")
        problems = self._problems("held_out", range(self.config.evaluation_prompts))
        batch = f"held_out-{self.state.step:06d}"
        requests = self._requests(batch, "held_out", problems, self.config.evaluation_completions, seed_by="held_out")
        graded = self._generate(batch, requests, list(problems.values()))
        metrics = EvaluationMetrics(
            **rollout_metrics(graded, self.config.task.pass_threshold).model_dump(),
            step=self.state.step,
            version=self.version,
            seconds=time.perf_counter() - started,
        )
        self.reporter.evaluation(metrics)
        return metrics

    def _problems(self, split: Split, indices: range) -> dict[int, Problem]:
        return {index: self.task.prompt(split, index) for index in indices}

    def _requests(
        self, batch: str, split: Split, problems: dict[int, Problem], completions: int, *, seed_by: str
    ) -> list[GroupRequest]:
        return [
            GroupRequest(
                id=f"{batch}-{number:05d}",
                prompt=problem.prompt,
                messages=problem.messages,
                n=completions,
                sampling=self.config.sampling.with_seed(sampling_seed(self.config.seed, seed_by, number)),
                metadata={"split": split, "index": index, "prompt": problem.digest},
            )
            for number, (index, problem) in enumerate(problems.items())
        ]

    def _generate(self, batch: str, requests: Sequence[GroupRequest], problems: Sequence[Problem]) -> list[GradedGroup]:
        """The graded groups, in the order of the requests; each is graded when it arrives."""
        problem_of = {request.id: problem for request, problem in zip(requests, problems, strict=True)}
        arrived = {}
        with self.reporter.groups(len(requests)) as advance, closing(self.source.rollouts(batch, requests)) as groups:
            for group in groups:
                arrived[group.id] = self._grade(group, problem_of[group.id])
                advance()
        return [arrived[str(request.id)] for request in requests]

    def _grade(self, group: Group, problem: Problem) -> GradedGroup:
        return GradedGroup(group, [self.task.reward(problem, completion.text) for completion in group.completions])

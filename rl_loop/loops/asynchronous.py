"""The asynchronous loop: generation does not wait for training, as far as the staleness bound allows.

      puller (thread)              main thread                    pusher (thread)        evaluation (thread)
        prompts, leases  ----->      waits for a batch              newest policy          held-out groups, while
        rewards (processes)          logprob, advantages     ---->  into every engine      generation goes on
        whole batches                train: version v -> v+1        while v+1 trains
                                     checkpoint, acknowledge

| loop       | consumes                       | waits for                        | is unblocked by       |
|------------|--------------------------------|----------------------------------|-----------------------|
| puller     | leases of the service's queue  | prompts_per_step finished groups | a group that finishes |
| main       | a batch of graded groups       | the puller                       | the batch             |
| pusher     | only the newest policy         | an update                        | the learner           |
| evaluation | the policy of its step, or newer | that version's publication     | the pusher            |

- Every update makes a new policy version: step s trains version `first + s`. The pusher skips a version if a newer one
  exists before its push begins. Each token carries the version that sampled it, which decides whether it is corrected.
- A batch is trained on after the service has answered the pushes of all versions in it. The answers say whether these
  versions are this run's.
- A group is trained on once. Its training, its name in groups.jsonl and the step's metrics happen in one section that
  no signal interrupts. It is acknowledged when a checkpoint holds all of that.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty
from typing import TypeVar

import httpx
import torch
from torch import Tensor

from rl_loop.loops.evaluation import BackgroundEvaluation, evaluate, generate_graded
from rl_loop.loops.loop import TrainingLoop
from rl_loop.loops.ownership import versions_of
from rl_loop.loops.pulling import Puller
from rl_loop.loops.pushing import Pusher
from rl_loop.loops.recording import Recording
from rl_loop.loops.retries import is_transient, with_retries
from rl_loop.loops.sources import EndpointSource
from rl_loop.loops.step import StageClock, StepBatch
from rl_loop.reports.metrics import EvaluationMetrics, GradedGroup, Overlap
from rl_loop.run.checkpoint import RunState
from rl_loop.run.groups_log import GroupsLog
from rl_loop.run.ledger import Heartbeat, Ledger, acknowledge
from rl_loop.tasks import TaskProblem
from rollout_service.client import RolloutError
from rollout_service.protocol import BatchesStatus, Group, GroupRequest, WeightStatus

T = TypeVar("T")

ENDS_WITHIN = 10.0
"""seconds to wait for each thread to end"""


@dataclass(eq=False)
class AsynchronousLoop(TrainingLoop):
    """Trains against a live service. `rewards` is a RewardsPool, so that one thread's grading does not delay the
    others."""

    source: EndpointSource
    recording: Recording | None = None
    """where to write the groups that were trained on"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.ownership, self.client = self.source.publisher, self.source.client
        self.ledger = Ledger(self.state.position, self.state.outstanding, self.state.trained)
        self.log = GroupsLog(self.config.output, self.state.step)
        self.evaluation: BackgroundEvaluation | None = None
        self.wasted_at_start = 0
        self.engines_idle_before: float | None = None

    def run(self) -> None:
        """Train to the last step. It leaves no lease. The checkpoint of step 0 is written before the first prompt is
        sent, since it holds the run's name, under which the service keeps the groups."""
        self.save()
        status = self._with_retries(self.client.weights)
        self.dtype = getattr(torch, status.dtype)
        self.first = self._first_version(status.policy)
        self.wasted_at_start = self._with_retries(self.client.batches).tokens_wasted
        self.pusher = Pusher(self.ownership, self.config.ready_timeout)
        self.puller = Puller(
            self.config, self.task, self.client, self.rewards, self.state.run, self.ledger,
            self._version, lambda: self.pusher.published, self.state.step,
        )  # fmt: skip
        self.heartbeat = Heartbeat(self.client, self.ledger, self.config.lease_seconds)
        threads = (self.pusher, self.puller, self.heartbeat)
        try:
            for thread in threads:
                thread.start()
            self._offer(self._exported())
            self._publish_drafter()
            while self.state.step < self.config.steps:
                self._step()
            if self.config.evaluate_every:
                self._evaluate()
                self._finish_evaluation(wait=True)
            self.save()
            self._wait_for_push(self._version(self.state.step))  # the service goes on with the policy of the end
            # The run's remaining groups were trained on and await acknowledgement, or were more than it needed.
            self._with_retries(lambda: self.client.cancel_prompts(self.state.run))
        finally:
            if self.evaluation is not None:
                self.evaluation.stop()
            for thread in threads:
                thread.stop()
            for thread in threads:
                thread.join(ENDS_WITHIN)

    def _first_version(self, in_service: WeightStatus) -> int:
        """The version of step 0, counted back so that the next step's version is above all that were in service.

        If the run was interrupted, other weights may have sampled its waiting groups. Then the version is raised so far
        that the service considers these groups too old and generates them again.
        """
        above = max(in_service.version, self.state.version)
        if self.ownership.holds(in_service):
            self.ownership.go_on_from(in_service, self.config.max_staleness)
        elif self.state.position > 0 or self.state.pushed:
            above += self.config.max_staleness
        return above + 1 - self.state.step

    def _version(self, step: int) -> int:
        """The version of the policy that `step`, counted from 0, trains."""
        return self.first + step

    def _with_retries(self, call: Callable[[], T]) -> T:
        return with_retries(call, self.config.ready_timeout)

    def save(self) -> Path:
        """Write the checkpoint, then acknowledge the groups whose training it holds."""
        self.state.pushed = self.ownership.recent(self.config.max_staleness)
        folder = super().save()
        with self.interruption.deferred():
            try:
                acknowledge(self.client, self.ledger, set(self.state.trained))
            except (httpx.TransportError, RolloutError) as error:  # a later checkpoint acknowledges them
                self.reporter.console.print(
                    f"the groups trained up to step {self.state.step} are not acknowledged yet: {error}"
                )
        return folder

    # --- a step ---

    def _before_batch(self, clock: StageClock) -> None:
        self.version = self._version(self.state.step)
        if self._is_evaluation_due:
            self._evaluate()

    def _next_batch(self, clock: StageClock) -> StepBatch:
        with clock("generation"):
            batch = self._pulled()
            self.check_versions([graded.group for graded in batch.graded])
            return batch

    def _pulled(self) -> StepBatch:
        while True:
            for thread in (self.puller, self.pusher, self.heartbeat):
                if thread.failure is not None:
                    raise thread.failure
            try:
                return self.puller.batches.get(timeout=1.0)
            except Empty:
                self.pusher.restore()

    def check_versions(self, groups: Sequence[Group]) -> None:
        """Raises ForeignWeights when weights that this run did not push sampled a token, and the error that ended the
        pusher."""
        newest = max((version for group in groups for version in versions_of(group)), default=0)
        if newest <= self.pusher.offered:
            # Engines sample with a version before its push is answered; the answer says whether it is ours.
            self._wait_for_push(newest)
        self.ownership.check(groups)

    def _wait_for_push(self, version: int) -> None:
        """Wait until that version, or a newer one, is in service. Raises the error that ended the pusher."""
        self.pusher.wait_for(version)
        if self.pusher.failure is not None:
            raise self.pusher.failure

    def _count(self, batch: StepBatch, after: RunState) -> None:
        self.ledger.consume(batch.names)
        after.position, after.outstanding, after.trained = self.ledger.snapshot()

    def _after_update(self, batch: StepBatch, clock: StageClock) -> None:
        step = self.state.step
        with clock("prepare"):
            exported = self._exported()
        self._offer(exported)
        self.log.step(step, [graded.group.id for graded in batch.graded], batch.spent)
        if self.recording is not None:
            with self.recording.open(f"train-{step:06d}") as file:
                file.writelines(graded.group.model_dump_json() + "\n" for graded in batch.graded)

    def _exported(self) -> Mapping[str, Tensor]:
        """A copy of the policy's tensors, since the learner goes on changing its own."""
        return {name: tensor.clone() for name, tensor in self.learner.export(self.dtype).items()}

    def _offer(self, tensors: Mapping[str, Tensor]) -> None:
        self.pusher.offer(self._version(self.state.step), tensors)

    def _after_step(self) -> None:
        self._publish_drafter()
        self._finish_evaluation(wait=False)

    def _publish_drafter(self) -> None:
        """Push the drafter and wait, since it is small. A service that is restarting gets it after the next step."""
        try:
            super()._publish_drafter()
        except (httpx.TransportError, RolloutError) as error:
            if not is_transient(error):
                raise
            self.reporter.console.print(f"the drafter was not pushed, and will be after the next step: {error}")

    # --- measures ---

    def _overlap(self, waited: float) -> Overlap:
        overlap, status = super()._overlap(waited), self._queue_status()
        if status is None:
            return overlap
        idle = sum(status.engines_idle) / len(status.engines_idle) if status.engines_idle else None
        before, self.engines_idle_before = self.engines_idle_before, idle
        overlap.engines_idle = None if idle is None or before is None else max(0.0, idle - before)
        overlap.tokens_wasted = max(0, status.tokens_wasted - self.wasted_at_start)
        return overlap

    def _queue_status(self) -> BatchesStatus | None:
        """The queue's status, or None if the service does not answer: it is needed only for metrics."""
        try:
            return self.client.batches()
        except (httpx.TransportError, RolloutError):
            return None

    # --- held-out evaluation ---

    def _evaluate(self) -> None:
        """Begin an evaluation of this step's policy, which runs beside training."""
        self._finish_evaluation(wait=True)
        version = self._version(self.state.step)
        measure = partial(self._measure, self.state.step, version)
        self.evaluation = BackgroundEvaluation(self.pusher, version, measure)
        self.evaluation.start()

    def _measure(self, step: int, version: int, stopping: threading.Event) -> EvaluationMetrics:
        def generate(
            batch: str, requests: Sequence[GroupRequest], problems: Sequence[TaskProblem]
        ) -> list[GradedGroup]:
            sample = partial(generate_graded, self.source, self.rewards, batch, requests, problems)
            graded = with_retries(sample, self.config.ready_timeout, stopping)
            self.check_versions([g.group for g in graded])
            return graded

        return evaluate(self.config, self.task, generate, self.rewards, step, version)

    def _finish_evaluation(self, wait: bool) -> None:
        """Report the evaluation if it has ended. With `wait`, first wait for its end."""
        if self.evaluation is None or (self.evaluation.is_alive() and not wait):
            return
        self.evaluation.join()
        ended, self.evaluation = self.evaluation, None
        if ended.failure is not None:
            raise ended.failure
        if ended.metrics is not None:
            self.reporter.evaluation(ended.metrics)

"""The asynchronous loop: generation never waits for training, as far as bounded staleness allows.

      puller (thread)              main thread                    pusher (thread)        evaluation (thread)
        prompts, leases  ----->      waits for a batch              newest policy          held-out groups, while
        rewards (processes)          logprob, advantages     ---->  into every engine      generation goes on
        whole batches                train: version v -> v+1        while v+1 trains
                                     checkpoint, acknowledge

| loop       | consumes                       | waits for                        | is unblocked by       |
|------------|--------------------------------|----------------------------------|-----------------------|
| puller     | leases of the service's queue  | prompts_per_step finished groups | a group that finishes |
| main       | a batch of graded groups       | the puller                       | the batch             |
| pusher     | the newest policy, no other    | an update                        | the learner           |
| evaluation | the policy of its step, or newer | that version's publication     | the pusher            |

- Policy versions are those of updates: the batch of step s is trained by version `first + s`. Versions that could not
  be pushed in time are skipped. Tokens carry the version that sampled them, and decide what is corrected.
- A batch is trained on once the pushes of its tokens' versions are answered: then each is known to be this run's.
- A group is trained on once: its training, its name in groups.jsonl and the step's metrics happen in one section that a
  signal does not cut; it is acknowledged when a checkpoint holds all that.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import Empty
from typing import TypeVar

import httpx
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from drafters.files.durable import make_folders, replacing
from drafters.files.text_lines import byte_lines
from rl_loop.config import TrainConfig
from rl_loop.learner.online_drafter import OnlineDrafter
from rl_loop.learner.policy_learner import Learner
from rl_loop.loops.interruption import Interruption
from rl_loop.loops.losslessness_alarm import check_losslessness
from rl_loop.loops.ownership import Ownership, versions_of
from rl_loop.loops.prompts import group_requests
from rl_loop.loops.pulling import PAUSE, Pulled, Puller
from rl_loop.loops.pushing import Pusher
from rl_loop.loops.sources import EndpointSource, delivered
from rl_loop.loops.step import StageClock, prepare, report_drafter, step_metrics
from rl_loop.reports.metrics import EvaluationMetrics, GradedGroup, Overlap, rollout_metrics
from rl_loop.reports.reporting import Reporter
from rl_loop.run.checkpoint import RunState, checkpoint_folder, prune_checkpoints, save_checkpoint
from rl_loop.run.ledger import TRANSIENT, Heartbeat, Ledger, acknowledge
from rl_loop.tasks import Task
from rl_loop.tasks.rewards import check_evaluation
from rl_loop.tasks.rewards_pool import RewardsPool
from rollout_service.client import RolloutError
from rollout_service.protocol import BatchesStatus, Group, WeightStatus

T = TypeVar("T")

GROUPS_FILE = "groups.jsonl"
ENDS_WITHIN = 10.0
"""seconds that the threads have to end"""


class AsynchronousLoop:
    """As SynchronousLoop, but for the service's weights in place of a source; grading is always the pool's."""

    def __init__(
        self, config: TrainConfig, task: Task, learner: Learner, tokenizer: PreTrainedTokenizerBase,
        ownership: Ownership, reporter: Reporter, pool: RewardsPool, state: RunState | None = None,
        interruption: Interruption | None = None, drafter: OnlineDrafter | None = None,
    ):  # fmt: skip
        self.config, self.task, self.learner, self.tokenizer = config, task, learner, tokenizer
        self.ownership, self.client = ownership, ownership.client
        self.reporter, self.pool, self.drafter = reporter, pool, drafter
        self.state = state or RunState(run=ownership.run)
        self.interruption = interruption or Interruption()
        self.ledger = Ledger(self.state.position, self.state.outstanding, self.state.trained)
        self.log = GroupsLog(config.output, self.state.step)
        self.evaluation: Evaluation | None = None
        self.wasted_at_start = 0
        self.engines_idle_before: float | None = None

    def run(self) -> None:
        """From the state's step to the last one; leaves a checkpoint of it, and no lease.

        Before the first prompt is sent it leaves a checkpoint of step 0. That holds the run's name, under which the
        service keeps the groups.
        """
        self.save()
        status = self._patiently(self.client.weights)
        self.dtype = getattr(torch, status.dtype)
        self.first = self._first_version(status.policy)
        self.wasted_at_start = self._patiently(self.client.batches).tokens_wasted
        self.pusher = Pusher(self.ownership, self.config.ready_timeout)
        self.puller = Puller(
            self.config, self.task, self.client, self.pool, self.state.run, self.ledger,
            self._version, lambda: self.pusher.published, self.state.step,
        )  # fmt: skip
        self.heartbeat = Heartbeat(self.client, self.ledger, self.config.lease_seconds)
        threads = (self.pusher, self.puller, self.heartbeat)
        try:
            for thread in threads:
                thread.start()
            self._publish()
            self._publish_drafter()
            while self.state.step < self.config.steps:
                self._step()
            if self.config.evaluate_every:
                self._evaluate()
                self._finish_evaluation(wait=True)
            self.save()
            # What is left of the run is trained on, but for its acknowledgement, or was more than it needed.
            self._patiently(lambda: self.client.cancel_prompts(self.state.run))
        finally:
            for thread in threads:
                thread.stop()
            for thread in threads:
                thread.join(ENDS_WITHIN)

    def _first_version(self, in_service: WeightStatus) -> int:
        """Of the run's first step, so that this one's is above all that were in service.

        Other weights may have sampled the groups that wait since the run was interrupted: then it is so far above that
        the service finds these too old, and generates them again.
        """
        above = max(in_service.version, self.state.version)
        if self.ownership.holds(in_service):
            self.ownership.go_on_from(in_service, self.config.max_staleness)
        elif self.state.position > 0 or self.state.pushed:
            above += self.config.max_staleness
        return above + 1 - self.state.step

    def _patiently(self, call: Callable[[], T]) -> T:
        """Through a service that is being started again."""
        deadline = time.monotonic() + self.config.ready_timeout
        while True:
            try:
                return call()
            except (httpx.TransportError, RolloutError) as error:
                lasting = isinstance(error, RolloutError) and error.status not in TRANSIENT
                if lasting or time.monotonic() > deadline:
                    raise
                time.sleep(PAUSE)

    def save(self) -> Path:
        """The checkpoint of the last finished step, written unless it is there; then what it holds is acknowledged."""
        folder = checkpoint_folder(self.config.output, self.state.step)
        with self.interruption.deferred():
            if not folder.exists():
                self.state.pushed = self.ownership.recent(self.config.max_staleness)
                self.reporter.stage("checkpoint")
                save_checkpoint(folder, self.learner, self.tokenizer, self.state, self.drafter)
                prune_checkpoints(self.config.output, self.config.keep_checkpoints)
            try:
                acknowledge(self.client, self.ledger, set(self.state.trained))
            except (httpx.TransportError, RolloutError) as error:  # they come again, and are acknowledged then
                self.reporter.console.print(f"groups of step {self.state.step} are not acknowledged yet: {error}")
        return folder

    def _version(self, step: int) -> int:
        """The policy's that is trained in a step, from 0."""
        return self.first + step

    def _publish(self) -> None:
        self.pusher.offer(self._version(self.state.step), self._tensors())

    def _publish_drafter(self) -> None:
        """Bring what the drafter has learned into service. It is small, so the loop waits; a service that is being
        started again gets it after the next step."""
        if self.drafter is None:
            return
        try:
            self.drafter.publish(EndpointSource(self.ownership).publish_drafter)
        except (httpx.TransportError, RolloutError) as error:
            if isinstance(error, RolloutError) and error.status not in TRANSIENT:
                raise
            self.reporter.console.print(f"the drafter could not be pushed yet: {error}")

    def _tensors(self) -> Mapping[str, Tensor]:
        """A copy: the learner goes on."""
        return {name: tensor.clone() for name, tensor in self.learner.checkpoint_tensors(self.dtype).items()}

    def _step(self) -> None:
        config, state = self.config, self.state
        clock, started = StageClock(self.reporter.stage), time.perf_counter()
        if config.evaluate_every and state.step % config.evaluate_every == 0:
            self._evaluate()
        with clock("generation"):
            batch = self._next_batch()
            self.check_versions([graded.group for graded in batch.graded])
        prepared = prepare(
            config, self.learner, batch.graded, self._version(state.step), clock, self.drafter, state.step
        )
        queue_status = self._queue_status()
        with self.interruption.deferred():
            with clock("train"):
                update = self.learner.train(prepared.examples, step=state.step)
            self.ledger.consume(
                batch.names
            )  # with the state right after the update: a checkpoint may be left from here
            position, outstanding, trained = self.ledger.snapshot()
            self.state = RunState(
                step=state.step + 1, position=position, version=prepared.version, run=state.run,
                outstanding=outstanding, trained=trained, losslessness=state.losslessness + prepared.on_policy,
            )  # fmt: skip
            with clock("prepare"):
                tensors = self._tensors()
            self.pusher.offer(self._version(self.state.step), tensors)
            self.log.step(self.state.step, batch, config.record_rollouts)
            self.reporter.step(
                step_metrics(
                    config, prepared, update, clock, self._overlap(clock, queue_status), step=self.state.step,
                    losslessness=self.state.losslessness, groups_replaced=batch.replaced,
                    groups_failed=batch.failed, rewards_failed=batch.rewards_failed,
                    seconds=time.perf_counter() - started,
                )
            )  # fmt: skip
            report_drafter(self.drafter, prepared, self.state.step, self.reporter)
        self._publish_drafter()
        self._finish_evaluation(wait=False)
        if config.checkpoint_every and self.state.step % config.checkpoint_every == 0:
            self.save()
        check_losslessness(config, self.state.losslessness, self.state.step, self.reporter.alarm)

    def _next_batch(self) -> Pulled:
        while True:
            for thread in (self.puller, self.pusher, self.heartbeat):
                if thread.failure is not None:
                    raise thread.failure
            try:
                return self.puller.batches.get(timeout=1.0)
            except Empty:
                self.pusher.restore()

    def check_versions(self, groups: Sequence[Group]) -> None:
        """Raises ForeignWeights when weights that this run did not push sampled a token, and what ended the pusher."""
        newest = max((version for group in groups for version in versions_of(group)), default=0)
        if newest <= self.pusher.offered:
            # Engines sample by a version before its push is answered; the answer says whether it is ours.
            self.pusher.wait_for(newest)
            if self.pusher.failure is not None:
                raise self.pusher.failure
        self.ownership.check(groups)

    # --- measures ---

    def _queue_status(self) -> BatchesStatus | None:
        """None while the service does not answer: it is only measured with."""
        try:
            return self.client.batches()
        except (httpx.TransportError, RolloutError):
            return None

    def _overlap(self, clock: StageClock, status: BatchesStatus | None) -> Overlap:
        waited = clock.seconds["generation"]
        if status is None:
            return Overlap(exposed_generation=waited, learner_idle=waited)
        idle = sum(status.engines_idle) / len(status.engines_idle) if status.engines_idle else None
        before, self.engines_idle_before = self.engines_idle_before, idle
        return Overlap(
            exposed_generation=waited,
            learner_idle=waited,
            engines_idle=None if idle is None or before is None else max(0.0, idle - before),
            tokens_wasted=max(0, status.tokens_wasted - self.wasted_at_start),
        )

    # --- held-out evaluation ---

    def _evaluate(self) -> None:
        """Begin one: it waits for this step's policy to be in service, and runs beside training."""
        self._finish_evaluation(wait=True)
        self.evaluation = Evaluation(self, self.state.step, self._version(self.state.step))
        self.evaluation.start()

    def _finish_evaluation(self, wait: bool) -> None:
        """Report the evaluation that has ended, if any."""
        if self.evaluation is None or (self.evaluation.is_alive() and not wait):
            return
        self.evaluation.join()
        ended, self.evaluation = self.evaluation, None
        if ended.failure is not None:
            raise ended.failure
        if ended.metrics is not None:
            self.reporter.evaluation(ended.metrics)


class Evaluation(threading.Thread):
    """The same held-out problems with the same seeds each time, through the service's direct route."""

    def __init__(self, loop: AsynchronousLoop, step: int, version: int):
        super().__init__(name="evaluation", daemon=True)
        self.loop, self.step, self.version = loop, step, version
        self.metrics: EvaluationMetrics | None = None
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            self.loop.pusher.wait_for(self.version)
            if self.loop.pusher.published >= self.version:
                self.metrics = self._measure()
        except BaseException as error:
            self.failure = error

    def _measure(self) -> EvaluationMetrics:
        loop, config, started = self.loop, self.loop.config, time.perf_counter()
        problems = {index: loop.task.prompt("held_out", index) for index in range(config.evaluation_prompts)}
        completions = config.evaluation_completions
        requests = group_requests(config, "held_out", "held_out", problems, completions, seed_by="held_out")
        problem_of = {request.id: problem for request, problem in zip(requests, problems.values(), strict=True)}
        while True:  # a service that is started again in the middle is asked again
            try:
                groups = list(delivered(loop.client.rollouts(requests)))
                break
            except (httpx.TransportError, RolloutError) as error:
                lasting = isinstance(error, RolloutError) and error.status not in TRANSIENT
                if lasting or loop.pusher.stopping or time.perf_counter() - started > config.ready_timeout:
                    raise
                time.sleep(1.0)
        loop.check_versions(groups)
        futures = [loop.pool.submit(problem_of[g.id], [c.text for c in g.completions]) for g in groups]
        graded = [
            GradedGroup.of(group, [reward.result() for reward in rewards])
            for group, rewards in zip(groups, futures, strict=True)
        ]
        check_evaluation(graded, loop.pool.last_failure)
        return EvaluationMetrics(
            **rollout_metrics(graded, config.task.pass_threshold).model_dump(),
            step=self.step,
            version=self.version,
            seconds=time.perf_counter() - started,
        )


class GroupsLog:
    """groups.jsonl: which groups each step was trained on, and which were spent; a resumed run's lines are those of its
    own past. With `record_rollouts`, the groups themselves in rollouts/."""

    def __init__(self, output: Path, step: int):
        make_folders(output)
        self.output, self.file = output, output / GROUPS_FILE
        lines = byte_lines(self.file) if self.file.is_file() else []
        kept = [line for line in lines if line.endswith(b"}") and json.loads(line)["step"] <= step]
        with replacing(self.file) as partial:
            partial.write_bytes(b"".join(line + b"\n" for line in kept))

    def step(self, step: int, batch: Pulled, record: bool) -> None:
        names = [g.group.id for g in batch.graded]
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": step, "groups": names, "spent": batch.spent}) + "\n")
        if record:
            folder = self.output / "rollouts"
            folder.mkdir(exist_ok=True)
            written = "".join(g.group.model_dump_json() + "\n" for g in batch.graded)
            (folder / f"train-{step:06d}.jsonl").write_text(written, encoding="utf-8")

"""Puller: keeps prompts in the service's queue, leases finished groups, grades them, and hands over whole batches.

    indices -> prompts --(queue)--> leased groups -> reward processes -> batch of prompts_per_step groups -> learner

- A training problem is named by its index in the run. So sending it again, after a resume or after a restart of the
  service, changes nothing.
- A group is acknowledged when a checkpoint holds its training. If the trainer dies before that, the group comes again.
  If a lease ends and a group comes again after it was trained on, it is acknowledged and not trained on a second time.
- If the service hands out a group as failed, the group is logged, left out, and replaced by another problem's. It is
  acknowledged with the batch. A run whose groups all fail ends, and so does a run whose rewards all fail
  (rl_loop/tasks/rewards.py).
- Prompts for step s are sent when the policy of step s - max_staleness is in service. A group's oldest token decides up
  to which step the group may be used. So the staleness bound holds in training, and no group is generated only to
  become too old. No prompts are sent before a policy of this run is in service: another run's samples are not trained
  on.
"""

import logging
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

from rl_loop.config import TrainConfig
from rl_loop.loops.prompts import sampling_seed
from rl_loop.loops.retries import Stopped, with_retries
from rl_loop.loops.step import StepBatch, rewards_differ
from rl_loop.reports.metrics import GradedGroup
from rl_loop.run.ledger import Ledger, index_of, name_of, release
from rl_loop.tasks import Task
from rl_loop.tasks.rewards import LostGroups, Rewards
from rollout_service.client import RolloutClient, RolloutError
from rollout_service.protocol import Batch, FailedGroup, GroupRequest, LeaseRequest, PromptsRequest

logger = logging.getLogger("rl_loop")
T = TypeVar("T")

LEASE_WAIT = 0.2
"""seconds that a request for a batch may wait in the service; the puller sends prompts between two requests"""
FAILED_IN_A_ROW = 16
"""a run ends after this many failed groups in a row, or after prompts_per_step of them if that is more"""


class EveryGroupFailed(RuntimeError):
    """The service could not generate any of the last groups that this run asked for."""


class Puller(threading.Thread):
    """Runs until the last step's batch is complete, or until `stop`. It puts batches in `batches`. If it fails,
    `failure` is the error."""

    def __init__(
        self, config: TrainConfig, task: Task, client: RolloutClient, rewards: Rewards, run: str, ledger: Ledger,
        versions: Callable[[int], int], published: Callable[[], int], first_step: int,
    ):  # fmt: skip
        """`versions`: from a step, counted from 0, to the policy version that it trains. `published`: the version in
        service, or 0 when none of this run's is."""
        super().__init__(name="puller", daemon=True)
        self.config, self.task, self.client, self.rewards = config, task, client, rewards
        self.run_name, self.ledger, self.step = run, ledger, first_step
        self.versions, self.published = versions, published
        self.batches: queue.Queue[StepBatch] = queue.Queue(maxsize=1)
        self.stopping = threading.Event()
        self.failure: BaseException | None = None
        self.ready: list[GradedGroup] = []  # graded, but not in a batch yet
        self.due: dict[int, int] = {}  # the last step that may use a problem's group, if its generation begins at once
        self.spent: list[str] = []
        self.replaced = self.failed = self.rewards_failed = self.failed_in_a_row = 0
        self.lost = LostGroups(config.prompts_per_step)
        self.arrived: set[int] = set()  # indices leased, but not trained on yet
        self.resend = True

    def run(self) -> None:
        try:
            self._with_retries(lambda: self.client.return_leases(self.run_name))  # those of an earlier trainer
            while self.step < self.config.steps and not self.stopping.is_set():
                batch = StepBatch(
                    self._collect(), spent=self.spent, replaced=self.replaced, failed=self.failed,
                    rewards_failed=self.rewards_failed,
                )  # fmt: skip
                self.spent, self.replaced, self.failed, self.rewards_failed = [], 0, 0, 0
                self._hand_over(batch)
                self.step += 1
        except Stopped:
            pass
        except BaseException as error:
            self.failure = error

    def stop(self) -> None:
        self.stopping.set()

    def _hand_over(self, batch: StepBatch) -> None:
        while not self.stopping.is_set():
            try:
                return self.batches.put(batch, timeout=0.2)
            except queue.Full:
                continue

    def _collect(self) -> list[GradedGroup]:
        """The step's batch. It is complete when it is full and no group is on its way that only this step could use.

        So the batch waits for a long response that would be too old for the next step. Otherwise shorter responses
        would overtake it, and it would be generated in vain.
        """
        wanted = self.config.prompts_per_step
        while True:
            self._send_prompts()
            self._return_too_old()
            if len(self.ready) >= wanted and not self._is_awaited():
                in_order = sorted(self.ready, key=self._last_step)
                self.ready = in_order[wanted:]
                return in_order[:wanted]
            request = LeaseRequest(
                groups=max(1, wanted - len(self.ready)), run=self.run_name, max_staleness=self.config.max_staleness,
                version=self.versions(self.step), wait=LEASE_WAIT, seconds=self.config.lease_seconds,
            )  # fmt: skip
            batch = self._with_retries(lambda request=request: self.client.lease(request))  # type: ignore[misc]
            if batch.lease is not None:
                self._take(batch.lease, batch)

    def _is_awaited(self) -> bool:
        """Whether a group is on its way that this step is the last to use."""
        with self.ledger.lock:
            return any(self.due.get(i, self.step) <= self.step for i in self.ledger.outstanding - self.arrived)

    def _last_step(self, graded: GradedGroup) -> int:
        """The last step that may train on the group by the staleness bound, which counts from its oldest token."""
        spans = [span.version for c in graded.group.completions for span in c.weight_versions]
        return min(spans, default=self.versions(self.step)) - self.versions(0) + self.config.max_staleness

    def _return_too_old(self) -> None:
        """Return groups that are too old for this step. This happens only after a resume."""
        for graded in [g for g in self.ready if self._last_step(g) < self.step]:
            self.ready.remove(graded)
            self.arrived.discard(index_of(graded.group.id))
            self._with_retries(lambda name=graded.group.id: release(self.client, self.ledger, name))  # type: ignore[misc]

    def _send_prompts(self) -> None:
        """Send as many prompts as the staleness bound can use. The policy of step p samples for steps up to
        p + max_staleness. Samples for a later step would be too old by then."""
        config, ledger, published = self.config, self.ledger, self.published()
        if published == 0:
            return
        with ledger.lock:
            self.arrived &= ledger.outstanding
            self.due = {index: step for index, step in self.due.items() if index in ledger.outstanding}
            to_come = sorted(ledger.outstanding - self.arrived)
            last = min(published - self.versions(0) + config.max_staleness, config.steps - 1)
            wanted = (last + 1 - self.step) * config.prompts_per_step - len(self.ready) - len(to_come)
            new = range(ledger.position, ledger.position + max(0, wanted))
            # For prompts sent before a resume, the step is not known; they are used in their order.
            unknown = [index for index in to_come if index not in self.due]
            self.due |= {index: self.step + i // config.prompts_per_step for i, index in enumerate(unknown)}
            self.due |= dict.fromkeys(new, last)
            indices = [*(sorted(ledger.outstanding) if self.resend else ()), *new]
        for first in range(0, len(indices), config.prompts_per_step):
            part = indices[first : first + config.prompts_per_step]
            request = PromptsRequest(
                groups=[self._request(index) for index in part], run=self.run_name, max_staleness=config.max_staleness
            )
            status = self._with_retries(lambda request=request: self.client.send_prompts(request))  # type: ignore[misc]
            gone = [index_of(name) for name in status.acknowledged]
            with ledger.lock:
                ledger.outstanding = (ledger.outstanding | set(part)) - set(gone)
                ledger.position = max(ledger.position, part[-1] + 1)
            if gone:
                logger.warning("%d problems were trained on after this checkpoint and are left out", len(gone))
        self.resend = False

    def _request(self, index: int) -> GroupRequest:
        problem = self.task.prompt("train", index)
        return GroupRequest(
            id=name_of(index), prompt=problem.prompt, messages=problem.messages, n=self.config.completions,
            sampling=self.config.sampling.with_seed(sampling_seed(self.config.seed, "train", index)),
            routed_experts=self.config.router_replay,
            metadata={"split": "train", "index": index, "prompt": problem.digest},
        )  # fmt: skip

    def _take(self, lease: str, batch: Batch) -> None:
        ledger = self.ledger
        with ledger.lock:
            ledger.held[lease] = {g.id for g in batch.groups} | {failed.id for failed in batch.failed}
            trained = ledger.held[lease] & ledger.trained
            # An earlier trainer may have sent prompts beyond the checkpoint that this one resumes from.
            ahead = max(map(index_of, ledger.held[lease]))
            self.resend |= ahead >= ledger.position
            while ledger.position <= ahead:
                ledger.outstanding.add(ledger.position)
                ledger.position += 1
            # A group that we hold may come again because its lease ended: we now hold it under this lease. A group that
            # was trained on is acknowledged with the next checkpoint, which holds its training.
            mine = {name for name in ledger.held[lease] - trained if index_of(name) not in self.arrived}
        self.arrived |= set(map(index_of, mine))
        new = [group for group in batch.groups if group.id in mine]
        self._leave_out([failed for failed in batch.failed if failed.id in mine], beside_finished=bool(new))
        rewards_of_groups = [
            self.rewards.submit(self.task.prompt("train", index_of(group.id)), [c.text for c in group.completions])
            for group in new
        ]
        for group, futures in zip(new, rewards_of_groups, strict=True):
            graded = GradedGroup.of(group, [future.result() for future in futures])
            self.rewards_failed += graded.failed
            kept = self.lost.keep(graded, self.rewards.last_failure)
            if kept and (rewards_differ(graded) or not self.config.loss.dynamic_sampling):
                self.ready.append(graded)
            else:
                self.spent.append(group.id)
                self.replaced += kept

    def _leave_out(self, failed: list[FailedGroup], *, beside_finished: bool) -> None:
        """Log and leave out groups that the service could not generate. Raises EveryGroupFailed."""
        for group in failed:
            logger.error("group %s failed and is left out: %s", group.id, group.error)
        self.spent += [group.id for group in failed]
        self.failed += len(failed)
        self.failed_in_a_row = 0 if beside_finished else self.failed_in_a_row + len(failed)
        if self.failed_in_a_row >= max(FAILED_IN_A_ROW, self.config.prompts_per_step):
            # The run sends them again when it is resumed, and by then the cause may be fixed.
            self._with_retries(lambda: self.client.cancel_prompts(self.run_name))
            raise EveryGroupFailed(
                f"the last {self.failed_in_a_row} groups failed, and no group finished between them; the last one, "
                f"{failed[-1].id}: {failed[-1].error}"
            )

    def _with_retries(self, call: Callable[[], T]) -> T:
        """The answer of `call`, repeated for `ready_timeout` seconds while the service is full or restarting."""
        return with_retries(call, self.config.ready_timeout, self.stopping, self._noticed)

    def _noticed(self, error: Exception) -> None:
        """Send the prompts again after an error that may mean a restart: no answer at all, or a 503. A service without
        a state folder has lost them then. For any other service, sending them again changes nothing."""
        self.resend |= not isinstance(error, RolloutError) or error.status == 503

"""Rewards, and what a failed reward costs. The rules are the same in both modes, and in every process.

- A reward fails if it raises or is not a finite number. In a worker process (rl_loop/tasks/rewards_pool.py) it also
  fails if it takes too long or ends the process. The completion is then logged, counted and left out.
- A group with fewer than two rewards left is lost, since there is nothing to compare. A synchronous step goes on
  without it; an asynchronous run takes another problem's group. A step without any group is never trained on.
- A run ends, with a checkpoint, when LOST_IN_A_ROW groups in a row are lost: the reward must be wrong.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

from rl_loop.reports.metrics import GradedGroup
from rl_loop.tasks.task import Task, TaskProblem, finite_reward

logger = logging.getLogger("rl_loop")

LOST_IN_A_ROW = 16
"""a run ends after this many lost groups in a row, or after prompts_per_step of them if that is more"""


class RewardsFailed(RuntimeError):
    """Too many rewards failed. The message gives the last failure."""


class Rewards(Protocol):
    """What grades responses: RewardsHere, or RewardsPool (rl_loop/tasks/rewards_pool.py)."""

    last_failure: str
    """why the last failed reward failed"""

    def submit(self, problem: TaskProblem, responses: Sequence[str]) -> list[Future[float | None]]:
        """Each response's reward, or None if it failed."""


class RewardsHere:
    """Like RewardsPool, but in this process: there is no time limit, and the caller waits."""

    def __init__(self, task: Task):
        self.task = task
        self.last_failure = ""

    def submit(self, problem: TaskProblem, responses: Sequence[str]) -> list[Future[float | None]]:
        """Each response's reward, already computed, or None if it failed."""
        futures: list[Future[float | None]] = [Future() for _ in responses]
        for future, response in zip(futures, responses, strict=True):
            future.set_result(self._reward(problem, response))
        return futures

    def _reward(self, problem: TaskProblem, response: str) -> float | None:
        try:
            return finite_reward(self.task, problem, response)
        except (Exception, SystemExit) as error:
            self.last_failure = f"{type(error).__name__}: {error}"
            logger.warning("a reward raised, so its completion is left out: %s", self.last_failure)
            return None


class LostGroups:
    """Counts the groups in a row that were lost to failed rewards."""

    def __init__(self, prompts_per_step: int):
        self.limit = max(LOST_IN_A_ROW, prompts_per_step)
        self.in_a_row = 0

    def keep(self, graded: GradedGroup, last_failure: str) -> bool:
        """Whether the group is kept. Raises RewardsFailed when `limit` groups in a row were lost."""
        kept = len(graded.rewards) > 1
        self.in_a_row = 0 if kept else self.in_a_row + 1
        if self.in_a_row >= self.limit:
            raise RewardsFailed(
                f"the last {self.in_a_row} groups had fewer than two rewards left, since rewards failed; the last "
                f"failure: {last_failure}. Correct the reward, and continue with --resume"
            )
        return kept


def check_evaluation(graded: Sequence[GradedGroup], last_failure: str) -> None:
    """Raises RewardsFailed when every reward of the held-out problems failed."""
    if not any(g.rewards for g in graded):
        raise RewardsFailed(
            f"no held-out response has a reward; the last failure: {last_failure}. Correct the reward, and continue "
            "with --resume"
        )

"""Rewards, and what one that fails costs. The rule is the same in both modes, in this process and in others.

- A reward that raises, or is not a finite number, costs its completion: it is told, counted and left out. So does one
  that takes too long or ends its process, where rewards have processes of their own (rl_loop/tasks/rewards_pool.py).
- A group with fewer than two rewards left is lost: there is nothing to compare. The step does without it in synchronous
  training, and has another problem's group in asynchronous training. A step that has no group is never trained on.
- A run ends, with a checkpoint, when so many groups in a row were lost that the reward must be wrong.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

from rl_loop.reports.metrics import GradedGroup
from rl_loop.tasks.task import Task, TaskProblem, finite_reward

logger = logging.getLogger("rl_loop")

LOST_IN_A_ROW = 16
"""lost groups with no other between them, after which a run ends; a batch's number, where that is more"""


class RewardsFailed(RuntimeError):
    """Hardly a reward could be had. The message says what became of the last one."""


class Rewards(Protocol):
    """RewardsHere, or RewardsPool (rl_loop/tasks/rewards_pool.py)."""

    last_failure: str
    """what became of the last reward that failed"""

    def submit(self, problem: TaskProblem, responses: Sequence[str]) -> list[Future[float | None]]:
        """Each response's reward; None for one that failed."""


class RewardsHere:
    """As RewardsPool, but in this process: there is no time limit, and nothing else goes on meanwhile."""

    def __init__(self, task: Task):
        self.task = task
        self.last_failure = ""

    def submit(self, problem: TaskProblem, responses: Sequence[str]) -> list[Future[float | None]]:
        """Each response's reward, which is there already; None for one that failed."""
        futures: list[Future[float | None]] = [Future() for _ in responses]
        for future, response in zip(futures, responses, strict=True):
            future.set_result(self._reward(problem, response))
        return futures

    def _reward(self, problem: TaskProblem, response: str) -> float | None:
        try:
            return finite_reward(self.task, problem, response)
        except (Exception, SystemExit) as error:
            self.last_failure = f"{type(error).__name__}: {error}"
            logger.warning("a reward raised and costs its completion: %s", self.last_failure)
            return None


class LostGroups:
    """Counts the groups in a row that were lost to failed rewards."""

    def __init__(self, prompts_per_step: int):
        self.limit = max(LOST_IN_A_ROW, prompts_per_step)
        self.in_a_row = 0

    def keep(self, graded: GradedGroup, last_failure: str) -> bool:
        """Whether the group is kept. Raises RewardsFailed at the last one that is lost."""
        kept = len(graded.rewards) > 1
        self.in_a_row = 0 if kept else self.in_a_row + 1
        if self.in_a_row >= self.limit:
            raise RewardsFailed(
                f"rewards failed until the last {self.in_a_row} groups had fewer than two left; the last failure: "
                f"{last_failure}. Mend the reward, and go on with --resume"
            )
        return kept


def check_evaluation(graded: Sequence[GradedGroup], last_failure: str) -> None:
    """Raises RewardsFailed when held-out problems have no reward at all."""
    if not any(g.rewards for g in graded):
        raise RewardsFailed(
            f"no held-out response has a reward; the last failure: {last_failure}. Mend the reward, and go on with "
            "--resume"
        )

"""Held-out evaluation: the same problems with the same seeds each time, sampled as in training."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import closing

from rl_loop.config import TrainConfig
from rl_loop.loops.prompts import group_requests
from rl_loop.loops.pushing import Pusher
from rl_loop.loops.retries import Stopped
from rl_loop.loops.sources import RolloutSource, delivered
from rl_loop.reports.metrics import EvaluationMetrics, GradedGroup, rollout_metrics
from rl_loop.tasks import Task, TaskProblem
from rl_loop.tasks.rewards import Rewards, check_evaluation
from rollout_service.protocol import Group, GroupRequest

Generate = Callable[[str, Sequence[GroupRequest], Sequence[TaskProblem]], list[GradedGroup]]
"""from a batch's name, its requests and their problems to its graded groups"""


def generate_graded(
    source: RolloutSource, rewards: Rewards, batch: str, requests: Sequence[GroupRequest],
    problems: Sequence[TaskProblem], advance: Callable[[], None] = lambda: None,
) -> list[GradedGroup]:  # fmt: skip
    """The graded groups in the order of the requests, without those that failed. Each group is graded when it arrives,
    and then `advance` is called."""
    problem_of = {request.id: problem for request, problem in zip(requests, problems, strict=True)}
    arrived: dict[str, tuple[Group, list[Future[float | None]]]] = {}
    with closing(source.rollouts(batch, requests)) as groups:
        for group in delivered(groups):
            of_group = rewards.submit(problem_of[group.id], [c.text for c in group.completions])
            arrived[group.id] = group, of_group
            advance()
    in_order = [arrived[str(request.id)] for request in requests if request.id in arrived]
    return [GradedGroup.of(group, [reward.result() for reward in of_group]) for group, of_group in in_order]


def evaluate(
    config: TrainConfig, task: Task, generate: Generate, rewards: Rewards, step: int, version: int
) -> EvaluationMetrics:
    """Evaluate the policy of `version`, after `step` finished steps. Raises RewardsFailed when no response has a
    reward."""
    started = time.perf_counter()
    problems = {index: task.prompt("held_out", index) for index in range(config.evaluation_prompts)}
    batch = f"held_out-{step:06d}"
    requests = group_requests(config, batch, "held_out", problems, config.evaluation_completions, seed_by="held_out")
    graded = generate(batch, requests, list(problems.values()))
    check_evaluation(graded, rewards.last_failure)
    return EvaluationMetrics(
        **rollout_metrics(graded, config.task.pass_threshold).model_dump(),
        step=step,
        version=version,
        seconds=time.perf_counter() - started,
    )


class BackgroundEvaluation(threading.Thread):
    """An evaluation that waits until its version is in service, and runs beside training."""

    def __init__(self, pusher: Pusher, version: int, measure: Callable[[threading.Event], EvaluationMetrics]):
        """`measure` receives an event that tells it to give up."""
        super().__init__(name="evaluation", daemon=True)
        self.pusher, self.version, self.measure = pusher, version, measure
        self.stopping = threading.Event()
        self.metrics: EvaluationMetrics | None = None
        self.failure: BaseException | None = None

    def stop(self) -> None:
        self.stopping.set()

    def run(self) -> None:
        try:
            self.pusher.wait_for(self.version)
            if self.pusher.published >= self.version:
                self.metrics = self.measure(self.stopping)
        except Stopped:
            pass
        except BaseException as error:
            self.failure = error

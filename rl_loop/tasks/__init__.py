"""Tasks: prompts and verifiable rewards. `make_task` builds the configured one."""

from rl_loop.config import TaskConfig
from rl_loop.tasks.custom_reward import CustomReward
from rl_loop.tasks.task import Split, Task, TaskError, TaskProblem

__all__ = ["Split", "Task", "TaskError", "TaskProblem", "make_task"]


def make_task(config: TaskConfig) -> Task:
    """The configured task. Raises TaskError, which names the wrong field."""
    task = _graded_task(config)
    return task if config.reward is None else CustomReward(task, config.reward)


def _graded_task(config: TaskConfig) -> Task:
    # Each task is imported only when it is used: importing reasoning-gym takes seconds.
    match config.kind:
        case "reasoning_gym":
            from rl_loop.tasks.reasoning_gym_task import ReasoningGymTask

            return ReasoningGymTask(config)
        case "jsonl":
            from rl_loop.tasks.jsonl_task import JsonlTask

            return JsonlTask(config)

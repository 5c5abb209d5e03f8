"""Tasks: prompts and verifiable rewards. `make_task` builds the configured one."""

from pkgutil import resolve_name

from rl_loop.task_config import TASKS, TaskConfig
from rl_loop.tasks.custom_reward import CustomReward
from rl_loop.tasks.task import Split, Task, TaskError, TaskProblem

__all__ = ["Split", "Task", "TaskError", "TaskProblem", "make_task"]


def make_task(config: TaskConfig) -> Task:
    """The configured task. Raises TaskError, which names the wrong field."""
    task = resolve_name(TASKS[config.kind])(config)
    return task if config.reward is None else CustomReward(task, config.reward)

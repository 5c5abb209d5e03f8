"""OwnReward: any task's prompts with the user's own grading, `package.module:function`."""

import importlib
import sys
from collections.abc import Callable
from typing import Any

from rl_loop.tasks.task import Problem, Split, Task, TaskError


class OwnReward:
    """`function(response, entry) -> float` replaces the task's reward. Modules in the working folder are found."""

    def __init__(self, task: Task, path: str):
        self.task = task
        self.function = load_function(path)

    def prompt(self, split: Split, index: int) -> Problem:
        return self.task.prompt(split, index)

    def reward(self, problem: Problem, response: str) -> float:
        return float(self.function(response, problem.entry))


def load_function(path: str) -> Callable[[str, dict[str, Any]], float]:
    module, _, name = path.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise TaskError(f"task.reward: {path}: {error}") from error
    if not callable(function):
        raise TaskError(f"task.reward: {path}: not a function")
    return function

"""OwnReward: any task's prompts with the user's own grading, `package.module:function`."""

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable
from typing import Any

from rl_loop.tasks.task import Problem, Split, Task, TaskError

OF_PYTHON = ("<frozen importlib", importlib.__file__)


class OwnReward:
    """`function(response, entry) -> float` replaces the task's reward. Modules in the working folder are found."""

    def __init__(self, task: Task, path: str):
        self.task = task
        self.function = load_function(path)

    def size(self, split: Split) -> int:
        return self.task.size(split)

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
        raise TaskError(f"task.reward: {path}: {error}{_where(error)}") from error
    except (Exception, SystemExit) as error:  # the module is the user's, and whatever it does is done here
        said = " ".join(str(error).split())  # of several lines, where it is pydantic's
        raise TaskError(f"task.reward: {path}: {type(error).__name__}: {said}{_where(error)}") from error
    if not callable(function):
        raise TaskError(f"task.reward: {path}: not a function")
    try:
        inspect.signature(function).bind("response", {})
    except TypeError as error:
        raise TaskError(f"task.reward: {path}: is called with the response and the problem's entry: {error}") from error
    except ValueError:  # a function written in C may have no signature
        pass
    return function


def _where(error: BaseException) -> str:
    """The line of the user's code that raised; nothing when none did, or when the error says it."""
    own = [f for f in traceback.extract_tb(error.__traceback__)[1:] if not f.filename.startswith(OF_PYTHON)]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own and not isinstance(error, SyntaxError) else ""

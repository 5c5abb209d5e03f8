"""CustomReward: the prompts of any task, graded by the user's own `package.module:function`."""

from rl_loop.custom_function import CustomFunctionError, load_function
from rl_loop.tasks.task import Split, Task, TaskError, TaskProblem


class CustomReward:
    """`function(response, entry) -> float` replaces the task's reward. Modules in the working folder are found."""

    def __init__(self, task: Task, path: str):
        self.task = task
        try:
            self.function = load_function(path, "task.reward", "the response and the problem's entry", "response", {})
        except CustomFunctionError as error:
            raise TaskError(str(error)) from error

    def size(self, split: Split) -> int:
        return self.task.size(split)

    def prompt(self, split: Split, index: int) -> TaskProblem:
        return self.task.prompt(split, index)

    def reward(self, problem: TaskProblem, response: str) -> float:
        return float(self.function(response, problem.entry))

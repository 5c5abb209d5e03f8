"""Toy tasks for reward processes, which import this module; so it does not import torch."""

import sys

from rl_loop.tasks.task import Split, TaskProblem


class CountLetterA:
    """Reward: the share of the letter a in the response."""

    def size(self, split: Split) -> int:
        return 10

    def prompt(self, split: Split, index: int) -> TaskProblem:
        return TaskProblem(entry={}, prompt=f"{index % 10}+{'1' if split == 'train' else '2'}\n")

    def reward(self, problem: TaskProblem, response: str) -> float:
        return response.count("a") / max(1, len(response))


class HalfIndifferent(CountLetterA):
    """All rewards of a prompt with an even number are equal, so it teaches nothing."""

    def reward(self, problem: TaskProblem, response: str) -> float:
        return 0.5 if int((problem.prompt or "")[0]) % 2 == 0 else super().reward(problem, response)


class Failing(CountLetterA):
    def reward(self, problem: TaskProblem, response: str) -> float:
        if "b" in response:
            raise ValueError("no b, please")
        return super().reward(problem, response)


class FailingAt(CountLetterA):
    """For responses `problem.completion` of `toys.Positioned`. The reward is the completion's number, except
    at the `positions`, where `how` says what happens."""

    def __init__(self, positions, how: str = "raise"):
        self.positions, self.how = positions, how

    def reward(self, problem: TaskProblem, response: str) -> float:
        index, completion = map(int, response.split("."))
        if (index, completion) not in self.positions:
            return float(completion)
        if self.how == "raise":
            raise LookupError(f"no reward for {response}")
        if self.how == "exit":
            sys.exit("a reward that exits")
        return float(self.how)

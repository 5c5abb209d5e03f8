"""Toy tasks, apart from the toys that need torch: reward processes import this module."""

from rl_loop.tasks.task import Problem, Split


class CountLetterA:
    """Reward: the share of the letter a in the response."""

    def prompt(self, split: Split, index: int) -> Problem:
        return Problem(entry={}, prompt=f"{index % 10}+{'1' if split == 'train' else '2'}\n")

    def reward(self, problem: Problem, response: str) -> float:
        return response.count("a") / max(1, len(response))


class HalfIndifferent(CountLetterA):
    """Prompts of even numbers teach nothing."""

    def reward(self, problem: Problem, response: str) -> float:
        return 0.5 if int((problem.prompt or "")[0]) % 2 == 0 else super().reward(problem, response)


class Failing(CountLetterA):
    def reward(self, problem: Problem, response: str) -> float:
        if "b" in response:
            raise ValueError("no b, please")
        return super().reward(problem, response)

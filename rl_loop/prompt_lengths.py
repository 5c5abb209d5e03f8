"""Prompt lengths: prompts that leave no room for a response in the served context are found before training starts.

All prompts of a file are measured before the start. Of a generated dataset, those that the run is expected to draw are
measured, up to MEASURED. A run that draws more (to replace groups that were left out) measures them as it draws them.
"""

import threading

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from drafters.chat import chat_text
from rl_loop.config import TrainConfig
from rl_loop.preflight import PreflightError
from rl_loop.tasks import Split, Task, TaskError, TaskProblem

MEASURED = 10_000
"""most problems of a generated dataset that are measured at the start; this takes some seconds"""
NAMED = 5
"""most overlong prompts that a message names"""


class PromptLengths:
    """The number of tokens of each of the task's prompts, as the service will count them. Each is counted once."""

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase):
        self.task, self.tokenizer = task, tokenizer
        self.known: dict[str, int] = {}

    def of(self, problem: TaskProblem) -> int:
        """The prompt's tokens. Raises PreflightError when the policy's chat template refuses the messages."""
        if problem.origin not in self.known:
            self.known[problem.origin] = prompt_tokens(self.tokenizer, problem)
        return self.known[problem.origin]

    def measure(self, config: TrainConfig) -> dict[Split, dict[str, int]]:
        """The tokens of each prompt, by its origin, for each split that the run uses. Raises PreflightError."""
        drawn: dict[Split, int] = {"train": config.steps * config.prompts_per_step}
        if config.evaluate_every:
            drawn["held_out"] = config.evaluation_prompts
        found: dict[Split, dict[str, int]] = {}
        for split, count in drawn.items():
            size = self.task.size(split)
            indices = range(size if config.task.kind == "jsonl" else min(size, count, MEASURED))
            problems = [self.task.prompt(split, index) for index in indices]
            found[split] = {problem.origin: self.of(problem) for problem in problems}
        return found


class FittingTask:
    """The task without its overlong prompts. Problem i of a split is the i-th one that fits, so each epoch has all that
    fit.

    With `overlong` = "refuse", none of the measured prompts is overlong; TaskError is raised when a later one is.
    """

    def __init__(self, task: Task, lengths: PromptLengths, longest: int, overlong: str):
        """`longest`: the most tokens that a prompt may have."""
        self.task, self.lengths, self.longest, self.overlong = task, lengths, longest, overlong
        self.lock = threading.Lock()  # training and held-out evaluation may draw at the same time
        self.fitting: dict[Split, list[int]] = {"train": [], "held_out": []}
        """the task's own indices of the problems that fit"""
        self.looked_at: dict[Split, int] = {"train": 0, "held_out": 0}
        self.skipped: set[str] = set()
        """origins of the skipped prompts"""

    def size(self, split: Split) -> int:
        return self.task.size(split)

    def prompt(self, split: Split, index: int) -> TaskProblem:
        with self.lock:
            fitting = self.fitting[split]
            while len(fitting) <= index:
                if self._fits(self.task.prompt(split, self.looked_at[split])):
                    fitting.append(self.looked_at[split])
                self.looked_at[split] += 1
            return self.task.prompt(split, fitting[index])

    def reward(self, problem: TaskProblem, response: str) -> float:
        return self.task.reward(problem, response)

    def _fits(self, problem: TaskProblem) -> bool:
        tokens = self.lengths.of(problem)
        if tokens <= self.longest:
            return True
        if self.overlong == "refuse":
            raise TaskError(
                f"task.overlong: {problem.origin} has {tokens} tokens, but only {self.longest} fit; continue with "
                "--resume --task.overlong skip"
            )
        self.skipped.add(problem.origin)
        return False


def fitting_task(
    config: TrainConfig, lengths: PromptLengths, measured: dict[Split, dict[str, int]], limit: int | None,
    console: Console,
) -> Task:  # fmt: skip
    """The task to train on, for a context of `limit` tokens (None: not known). Prints which prompts are skipped.

    Raises PreflightError when a prompt is overlong and may not be skipped, and when no prompt of a split fits.
    """
    if limit is None:
        return lengths.task
    room = limit - config.sampling.max_tokens
    overlong = {
        split: {origin: tokens for origin, tokens in of_split.items() if tokens > room}
        for split, of_split in measured.items()
    }
    every = {origin: tokens for of_split in overlong.values() for origin, tokens in of_split.items()}
    named = ", ".join(f"{origin} ({tokens} tokens)" for origin, tokens in list(every.items())[:NAMED])
    named += f" and {len(every) - NAMED} more" if len(every) > NAMED else ""
    if every and (config.task.overlong == "refuse" or any(len(overlong[s]) == len(measured[s]) for s in measured)):
        left = limit - max(every.values())
        lower = f"lower sampling.max_tokens to {left}, " if left > 0 else ""
        raise PreflightError(
            f"task.overlong: {len(every)} of {sum(map(len, measured.values()))} prompts are too long: {named}. The "
            f"served policy's max_model_len is {limit}, and sampling.max_tokens is {config.sampling.max_tokens}, so a "
            f"prompt may have {max(0, room)} tokens; {lower}shorten the prompts, or leave them out with "
            "--task.overlong skip"
        )
    if every:
        counts = " and ".join(f"{len(overlong[s])} of {len(measured[s])} prompts of {s}" for s in measured)
        console.print(f"task.overlong: the run skips {counts}: {named}", style="yellow", soft_wrap=True)
    return FittingTask(lengths.task, lengths, room, config.task.overlong)


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, problem: TaskProblem) -> int:
    """The number of tokens that the prompt has for the service. Raises PreflightError when the chat template refuses
    the messages."""
    if problem.messages is None:
        return len(tokenizer.encode(problem.prompt or ""))
    try:
        text = chat_text(tokenizer, [message.model_dump() for message in problem.messages])
    except ValueError as error:
        raise PreflightError(
            f"task: {problem.origin}: {error} (the roles of its messages are "
            f"{', '.join(m.role for m in problem.messages)}; see task.chat and task.system_prompt)"
        ) from error
    return len(tokenizer.encode(text, add_special_tokens=False))

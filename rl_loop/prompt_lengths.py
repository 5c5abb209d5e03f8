"""Prompt lengths: prompts that leave no room for a response in the served context are found before training starts.

Each prompt of a file is measured, and each that the run is to draw of a dataset without end. What a run draws beyond
these (in place of groups that were left out) is measured when it is drawn.
"""

import threading

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from drafters.chat import chat_text
from rl_loop.config import TrainConfig
from rl_loop.preflight import PreflightError
from rl_loop.tasks import Split, Task, TaskError, TaskProblem

MEASURED = 10_000
"""problems of a dataset that are measured at the start at most: some seconds"""
NAMED = 5
"""overlong prompts that a message names"""


class PromptLengths:
    """Tokens of the task's prompts, as the service will count them; each is counted once."""

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase):
        self.task, self.tokenizer = task, tokenizer
        self.known: dict[str, int] = {}

    def of(self, problem: TaskProblem) -> int:
        """Raises PreflightError when the policy's chat template refuses the messages."""
        if problem.origin not in self.known:
            self.known[problem.origin] = prompt_tokens(self.tokenizer, problem)
        return self.known[problem.origin]

    def measure(self, config: TrainConfig) -> dict[Split, dict[str, int]]:
        """Tokens by origin, of each split that the run uses. Raises PreflightError."""
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
    """The task without its overlong prompts: problem i of a split is the i-th that fits, so each epoch has all that do.

    With `overlong` = "refuse" there are none of which it is known; TaskError is raised when another one is drawn.
    """

    def __init__(self, task: Task, lengths: PromptLengths, longest: int, overlong: str):
        """`longest`: the tokens that a prompt may have."""
        self.task, self.lengths, self.longest, self.overlong = task, lengths, longest, overlong
        self.lock = threading.Lock()  # training and held-out evaluation may draw at once
        self.fitting: dict[Split, list[int]] = {"train": [], "held_out": []}
        """indices in the task's own order of those that fit"""
        self.looked_at: dict[Split, int] = {"train": 0, "held_out": 0}
        self.skipped: set[str] = set()
        """origins"""

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
                f"task.overlong: {problem.origin} has {tokens} tokens, and {self.longest} fit; go on with --resume and "
                "--task.overlong skip"
            )
        self.skipped.add(problem.origin)
        return False


def fitting_task(
    config: TrainConfig, lengths: PromptLengths, measured: dict[Split, dict[str, int]], limit: int | None,
    console: Console,
) -> Task:  # fmt: skip
    """The task as it is trained on, in a context of `limit` tokens (None: not known). Says what is skipped.

    Raises PreflightError when prompts are overlong and not to be skipped, and when a split has no other.
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
            f"task.overlong: {len(every)} of {sum(map(len, measured.values()))} prompts are too long: of the served "
            f"policy's max_model_len of {limit}, sampling.max_tokens of {config.sampling.max_tokens} leaves "
            f"{max(0, room)} tokens: {named}; {lower}shorten the prompts, or leave them out with --task.overlong skip"
        )
    if every:
        counts = " and ".join(f"{len(overlong[s])} of {len(measured[s])} prompts of {s}" for s in measured)
        console.print(f"task.overlong: skipping {counts}: {named}", style="yellow", soft_wrap=True)
    return FittingTask(lengths.task, lengths, room, config.task.overlong)


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, problem: TaskProblem) -> int:
    """How many tokens the service will make of the prompt. Raises PreflightError when it would refuse the messages."""
    if problem.messages is None:
        return len(tokenizer.encode(problem.prompt or ""))
    try:
        text = chat_text(tokenizer, [message.model_dump() for message in problem.messages])
    except ValueError as error:
        raise PreflightError(
            f"task: {problem.origin}: {error} (its roles are {', '.join(m.role for m in problem.messages)}; see "
            "task.chat and task.system_prompt)"
        ) from error
    return len(tokenizer.encode(text, add_special_tokens=False))

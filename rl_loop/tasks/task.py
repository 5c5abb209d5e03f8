"""Task: the interface of every source of prompts and rewards, and how an answer is found in a response."""

import hashlib
import math
import re
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from rl_loop.task_config import TaskConfig
from rollout_service.protocol import Message

Split = Literal["train", "held_out"]


class TaskError(ValueError):
    """The task's configuration or data is wrong. The message names the field or the line."""


@dataclass(frozen=True)
class TaskProblem:
    """One prompt, as text or chat messages, and what grading needs.

    Example: `TaskProblem(entry={"question": "2 + 2 =", "answer": "4"}, prompt="2 + 2 =\\n")`
    """

    entry: dict[str, Any]
    """the dataset's own record of the problem"""
    prompt: str | None = None
    messages: list[Message] | None = None
    origin: str = ""
    """where to find the problem; example: `prompts.jsonl, line 4`"""

    @property
    def digest(self) -> str:
        """A hash of the prompt, by which a replay checks that recorded rollouts belong to it."""
        text = self.prompt if self.messages is None else "\0".join(f"{m.role}\0{m.content}" for m in self.messages)
        return hashlib.sha256((text or "").encode()).hexdigest()[:16]


class Task(Protocol):
    def size(self, split: Split) -> int:
        """The number of problems in a split, after which they repeat."""

    def prompt(self, split: Split, index: int) -> TaskProblem:
        """Problem `index` of a split, for any index from 0. The same index always gives the same problem."""

    def reward(self, problem: TaskProblem, response: str) -> float:
        """How good a response is. It counts as right if this is at least `task.pass_threshold`."""


def finite_reward(task: Task, problem: TaskProblem, response: str) -> float:
    """The response's reward. Raises whatever the reward raises, and ValueError for infinity and not-a-number, since no
    advantages can be computed from these."""
    reward = float(task.reward(problem, response))
    if not math.isfinite(reward):
        raise ValueError(f"the reward is {reward}, not a finite number")
    return reward


def extract_answer(pattern: str, response: str) -> str:
    """The group of the last match of `pattern`, or the whole response if nothing matches."""
    matches = re.findall(pattern, response)
    return (matches[-1] if matches else response).strip()


def problem_from_text(config: TaskConfig, text: str, entry: dict[str, Any], origin: str = "") -> TaskProblem:
    if not config.chat:
        return TaskProblem(entry=entry, prompt=text + config.prompt_suffix, origin=origin)
    system = [] if config.system_prompt is None else [Message(role="system", content=config.system_prompt)]
    return TaskProblem(entry=entry, messages=[*system, Message(role="user", content=text)], origin=origin)

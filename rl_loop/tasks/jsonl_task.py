"""JsonlTask: the user's own prompts, one JSON object per line, graded by comparing answers.

    {"prompt": "What is 2 + 2?", "answer": "4"}
    {"messages": [{"role": "user", "content": "What is 2 + 2?"}], "answer": "4"}
    {"prompt": [{"role": "user", "content": "What is 2 + 2?"}], "answer": "4"}

The last two mean the same: TRL and verl write messages under the key `prompt`.

Other keys stay in the problem's entry, where a reward of your own finds them.

`task.grader` says how answers are compared (rl_loop/tasks/grading.py). "auto" looks at each problem's `answer`:

- a capital letter alone, perhaps in brackets (`B`, `(B)`), is a choice;
- an answer with words is text. A word is three letters in a row, or two letters that are the whole answer (`Paris`,
  `no`). Names of functions, LaTeX commands, `and`, `or`, and a word after a number (`12 apples`) do not count as words;
- any other answer is math if math-verify reads it as a formula (`1/2`, `x+1`, `(1,2)`), and text if it does not.

When the file is read, an `answer` that its grader cannot read is an error.
"""

import random
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from drafters.files.text_lines import numbered_json_lines
from rl_loop.task_config import TaskConfig
from rl_loop.tasks.grading import check_answer, grade
from rl_loop.tasks.task import Split, TaskError, TaskProblem, extract_answer, problem_from_text
from rollout_service.protocol import Message

MESSAGES = TypeAdapter(Annotated[list[Message], Field(min_length=1)])


class JsonlTask:
    """Training takes the problems in a new order each epoch. Held-out evaluation takes them in the file's order."""

    def __init__(self, config: TaskConfig):
        assert config.path is not None
        self.config = config
        problems = read_problems(config, config.path)
        if config.held_out_path is not None:
            self.problems = {"train": problems, "held_out": read_problems(config, config.held_out_path)}
        else:
            train = len(problems) - max(1, len(problems) // 10)
            self.problems = {"train": problems[:train], "held_out": problems[train:]}
        for split, of_split in self.problems.items():
            if not of_split:
                raise TaskError(f"task.path: {config.path}: too few problems: none is left for the {split} split")
        self.order = lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self.problems["train"])))
        random.Random(f"{self.config.seed} {epoch}").shuffle(order)
        return order

    def size(self, split: Split) -> int:
        return len(self.problems[split])

    def prompt(self, split: Split, index: int) -> TaskProblem:
        problems = self.problems[split]
        epoch, number = divmod(index, len(problems))
        return problems[self.order(epoch)[number] if split == "train" else number]

    def reward(self, problem: TaskProblem, response: str) -> float:
        answer = extract_answer(self.config.answer_pattern, response)
        return grade(self.config.grader, str(problem.entry["answer"]), answer)


def read_problems(config: TaskConfig, path: Path) -> list[TaskProblem]:
    try:
        lines = numbered_json_lines(path, partial(_problem, config))
        return [replace(problem, origin=f"{path}, line {number}") for number, problem in lines]
    except ValueError as error:
        raise TaskError(str(error)) from error


def _problem(config: TaskConfig, entry: dict[str, Any]) -> TaskProblem:
    if "answer" not in entry and config.reward is None:
        raise ValueError("has no `answer`, which is needed unless task.reward is set")
    if config.reward is None:
        check_answer(config.grader, entry["answer"])
    if ("prompt" in entry) == ("messages" in entry):
        raise ValueError("must have exactly one of `prompt` and `messages`")
    if isinstance(entry.get("prompt"), str):
        return problem_from_text(config, entry["prompt"], entry)
    name = "prompt" if "prompt" in entry else "messages"
    try:
        return TaskProblem(entry=entry, messages=MESSAGES.validate_python(entry[name]))
    except ValidationError as error:
        wrong = error.errors()[0]
        where = ".".join([name, *map(str, wrong["loc"])])
        text = "text or " if name == "prompt" else ""
        raise ValueError(f"`{where}`: {wrong['msg']}; it must be {text}messages, each with role and content") from None

"""TaskConfig: which task, with which prompts, and how it is graded. To add a kind of task, name its class in TASKS."""

import re
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import CliImplicitFlag

from drafters.settings import ExistingFile, Section
from rl_loop.custom_function import PATH

TASKS = {
    "reasoning_gym": "rl_loop.tasks.reasoning_gym_task:ReasoningGymTask",
    "jsonl": "rl_loop.tasks.jsonl_task:JsonlTask",
}
"""module:class of each kind of task, as text: `--help` must not wait for reasoning-gym"""
if TYPE_CHECKING:
    TaskKind = str
else:  # `--help` and the errors of a configuration list the kinds
    TaskKind = Literal[*TASKS]
Grader = Literal["auto", "math", "text", "choice"]


class TaskConfig(Section):
    """Where prompts come from, and how responses are graded."""

    kind: TaskKind = "reasoning_gym"
    name: str = "chain_sum"
    """reasoning_gym: the dataset's name"""
    params: dict[str, Any] = Field(default_factory=dict)
    """reasoning_gym: the dataset's own parameters"""
    size: int = Field(default=1_000_000, ge=1)
    """reasoning_gym: problems in each split; training starts over after the last one"""
    path: ExistingFile | None = None
    """jsonl: the file of prompts; each line is a JSON object with `answer`, and with `prompt` (text or messages) or
    `messages`"""
    held_out_path: ExistingFile | None = None
    """jsonl: the file of held-out prompts; if it is not set, the last tenth of `path` is held out"""
    seed: int = Field(default=0, ge=0)
    """reasoning_gym: selects the problems; jsonl: selects their order"""
    prompt_suffix: str = "\n"
    """appended to every prompt that is text"""
    chat: CliImplicitFlag[bool] = False
    """send the prompt as a chat message through the policy's chat template, instead of as text"""
    system_prompt: str | None = None
    """the system message that begins each chat"""
    overlong: Literal["refuse", "skip"] = "refuse"
    """what happens if a prompt leaves no room for sampling.max_tokens in the served context. refuse: the run does not
    start; skip: the run leaves the prompt out and counts it"""
    answer_pattern: str = r"Answer:\s*(.*)"
    """regular expression with one group; its last match in a response is the answer; if nothing matches, the whole
    response is the answer"""
    grader: Grader = "auto"
    """jsonl: how answers are compared. math: numbers and formulas, by value; text: ignoring case and the punctuation
    around it; choice: by letter; auto: chooses one of these for each problem, by its `answer`"""
    reward: str | None = None
    """your own reward, `package.module:function`; it is called with the response and the problem's entry, and replaces
    the grading"""
    pass_threshold: float = 1.0
    """a response is right if its reward is at least this"""

    @field_validator("answer_pattern")
    @classmethod
    def _one_group(cls, pattern: str) -> str:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        if groups != 1:
            raise ValueError(f"must have exactly one group, but has {groups}")
        return pattern

    @field_validator("reward")
    @classmethod
    def _module_and_function(cls, reward: str | None) -> str | None:
        if reward is not None and not PATH.fullmatch(reward):
            raise ValueError("must be package.module:function")
        return reward

    @model_validator(mode="after")
    def _is_read(self) -> "TaskConfig":
        of_kind = {"reasoning_gym": ("name", "params", "size"), "jsonl": ("path", "held_out_path", "grader")}
        self.refuse_unread([n for kind in of_kind if kind != self.kind for n in of_kind[kind]], f"kind = {self.kind!r}")
        if self.reward is not None:
            self.refuse_unread(["answer_pattern", "grader"], "reward, which grades by itself")
        if self.chat:
            self.refuse_unread(["prompt_suffix"], "chat = true")
        return self

    @model_validator(mode="after")
    def _has_prompts(self) -> "TaskConfig":
        if self.kind == "jsonl" and self.path is None:
            raise ValueError("path is needed for kind = jsonl")
        if self.system_prompt is not None and not self.chat:
            raise ValueError("system_prompt needs chat = true")
        return self

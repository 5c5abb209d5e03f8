"""FormatsConfig: every setting of `drafters formats`. It imports no torch, so `--help` and errors come at once."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import CliImplicitFlag

from drafters.drafter import DraftSampling
from drafters.registry import DrafterConfig, LearnerKind, make_drafter
from drafters.settings import ExistingFile, Section, Threads

FormatName = Literal[
    "mx9", "mx6", "mx4", "msfp16", "msfp12", "int8/256", "int8/32", "int4/32", "int4/16", "e4m3", "e5m2"
]  # fmt: skip


class QuantisedDrafter(Section):
    """A trained drafter of the policy, which is quantised too."""

    kind: LearnerKind
    """the kind of drafter"""
    model: str | None = None
    """folder or Hugging Face name of its checkpoint; for mtp, it is the policy's"""


class FormatsConfig(Section):
    """Compare formats of numbers by the noise that they add, and by the acceptance of drafts made with them."""

    output: Path = Path("report/formats")
    """folder for formats.json, the plots, and with a model or a policy layers.json and acceptance.json"""
    vectors: int = Field(default=10_000, ge=1)
    """random vectors on which each format is measured, of 256 elements"""
    seed: int = 0
    """seed of the vectors, and of the policy's responses"""
    formats: list[FormatName] = Field(default=["mx9", "mx6", "mx4"], min_length=1)
    """formats for `model` and `policy`; int8/256 are integers of 8 bits with a scale for 256 of them"""
    keep: list[str] = Field(default=["lm_head"])
    """parts of a model that stay as they are, by their names: `lm_head` is the output head"""
    model: str | None = None
    """measure the noise on the weights of this model, layer by layer, and on its activations if there are prompts: a
    folder or a Hugging Face name"""
    policy: str | None = None
    """predict the acceptance length of this policy's drafters in each format: a folder or a Hugging Face name. The
    first drafter is the policy itself with quantised weights"""
    drafters: list[QuantisedDrafter] = Field(default_factory=list)
    prompts: ExistingFile | None = None
    """JSON lines with `prompt`, `messages` or `prompt_token_ids`. The policy answers them; the model only reads them"""
    data: ExistingFile | None = None
    """samples of the policy, as `drafters train` reads them, instead of prompts"""
    max_length: int = Field(default=2048, ge=4)
    """samples of `data` are cut to this many tokens"""
    tokens: int = Field(default=20_000, ge=1)
    """the policy answers the prompts, in turns, until it has sampled at least this many tokens"""
    response_tokens: int = Field(default=256, ge=2)
    """longest response"""
    temperature: float = Field(default=1.0, ge=0.01, le=2)
    """temperature of policy and drafters"""
    draft_tokens: int = Field(default=3, ge=1, le=16)
    """tokens drafted per step (k)"""
    draft_sampling: list[DraftSampling] = Field(default=["probabilistic", "greedy"], min_length=1)
    """probabilistic: drafts are sampled; greedy: each draft is the drafter's most likely token"""
    activations: CliImplicitFlag[bool] = False
    """also quantise what a drafter's weights are multiplied with. The engines do not"""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """auto is cuda if there is a GPU"""
    threads: Threads = 0
    """CPU threads; 0 for all"""

    @model_validator(mode="after")
    def _fields_are_read(self) -> Self:
        sampled = ["tokens", "response_tokens"]
        of_policy = [*sampled, "drafters", "temperature", "draft_tokens", "draft_sampling", "activations"]
        if self.policy is None:
            self.refuse_unread(of_policy, "no policy")
        if self.policy is None and self.model is None:
            self.refuse_unread(["formats", "keep", "prompts", "data"], "no model and no policy")
        if self.data is None:
            self.refuse_unread(["max_length"], "no data")
        else:
            self.refuse_unread(["prompts", *sampled], "data")
        if self.policy is not None and self.prompts is None and self.data is None:
            raise ValueError("prompts: needed with a policy, which answers them; or give its samples as data")
        for drafter in self.drafters:
            make_drafter(DrafterConfig(kind=drafter.kind, model=drafter.model)).speculative_config()
        return self

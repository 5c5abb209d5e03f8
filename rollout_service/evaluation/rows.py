"""A row of the comparison: what was measured of one drafter, draft length, draft sampling and concurrency."""

import statistics
from dataclasses import dataclass, field

from pydantic import BaseModel

from drafters.acceptance import Acceptance, length_interval, total
from drafters.registry import DrafterConfig
from rollout_service.evaluation.ran import Ran
from rollout_service.protocol import Completion, Group

Z_LIMIT = 4.0
"""a correct sampler's |z| is larger once in 16,000 rows"""


class Row(BaseModel):
    """One row of compare.json. Intervals are 95 % confidence intervals. Ratios are ratios of sums."""

    drafter: str
    model: str
    """folder or Hugging Face name of the drafter's checkpoint; empty if it has none of its own"""
    draft_tokens: int
    draft_sampling: str
    """probabilistic or greedy; greedy for deterministic drafts; empty without a drafter"""
    verification: str
    """standard or block, and whose function verified; empty without a drafter"""
    concurrency: int
    acceptance_length: float
    """tokens that a verification yields, including the one after the accepted drafts; 1 without a drafter"""
    acceptance_length_ci: tuple[float, float] | None
    acceptance_rate: float
    """accepted / drafted"""
    acceptance_rate_ci: tuple[float, float] | None
    acceptance_by_position: list[float]
    """share of draft steps that accepted at least i tokens"""
    tokens_per_second: float
    """tokens of responses per second, over all rounds"""
    speedup: float | None
    """median over rounds of the speed relative to `none` in the same round; None without such a baseline"""
    z: float
    """the losslessness score, which is close to standard normal for a correct sampler"""
    tokens: int
    dtype: str
    """dtype of the engine's weights and caches"""
    context: float
    """tokens of prompt and response in a decoding step, mean over the responses"""
    step_seconds: float
    """seconds of a decoding step, as if all `concurrency` streams were in every step. Prompts count as steps, and at
    the end there are fewer streams: both make it longer than a step of full streams"""

    @property
    def is_lossless(self) -> bool:
        """As far as its tokens can tell."""
        return abs(self.z) < Z_LIMIT


@dataclass
class Cell:
    """The measurements of one row while they are collected. `seconds` and `tokens` have one entry for each round."""

    drafter: DrafterConfig
    """the row's drafter, with its way to sample and verify drafts"""
    concurrency: int
    dtype: str = "bfloat16"
    """dtype of its engine's weights and caches"""
    ran: Ran | None = None
    """how its engine sampled and verified drafts"""
    groups: list[Group] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def add_round(self, groups: list[Group], seconds: float) -> None:
        self.groups += groups
        self.seconds.append(seconds)
        self.tokens.append(sum(len(c.token_ids) for g in groups for c in g.completions))

    @property
    def speeds(self) -> list[float]:
        """Tokens per second, round by round."""
        return [tokens / seconds for tokens, seconds in zip(self.tokens, self.seconds, strict=True)]

    @property
    def context(self) -> float:
        return statistics.mean(
            len(g.prompt_token_ids) + len(c.token_ids) / 2 for g in self.groups for c in g.completions
        )

    @property
    def step_seconds(self) -> float:
        steps = sum(steps_of(completion) for group in self.groups for completion in group.completions)
        return sum(self.seconds) * self.concurrency / steps

    def row(self, baseline: "Cell | None", z: float) -> Row:
        parts = [
            Acceptance(c.speculation.drafted, c.speculation.accepted_histogram)
            for g in self.groups
            for c in g.completions
            if c.speculation
        ]
        whole = total(parts)
        interval = length_interval(parts) if whole.steps else None
        drafts_a_step = whole.drafted / whole.steps if whole.steps else 1.0
        off = not self.drafter.drafts
        ran = self.ran or (Ran() if off else Ran(self.drafter.draft_sampling, self.drafter.verification))
        return Row(
            drafter=self.drafter.kind,
            model=self.drafter.model or "",
            draft_tokens=0 if off else self.drafter.draft_tokens,
            **ran._asdict(),
            concurrency=self.concurrency,
            acceptance_length=whole.length,
            acceptance_length_ci=interval,
            acceptance_rate=whole.rate,
            acceptance_rate_ci=interval and tuple((end - 1.0) / drafts_a_step for end in interval),
            acceptance_by_position=whole.by_position,
            tokens_per_second=sum(self.tokens) / sum(self.seconds),
            speedup=statistics.median(a / b for a, b in zip(self.speeds, baseline.speeds, strict=True))
            if baseline
            else None,
            z=z,
            tokens=sum(self.tokens),
            dtype=self.dtype,
            context=self.context,
            step_seconds=self.step_seconds,
        )


def steps_of(completion: Completion) -> int:
    """The steps that a response took, with the one of its prompt.

    Each step without drafts yields one token, and the prompt's step has none. The last step may yield more tokens than
    the response takes, so steps without drafts can only be counted where they are many: n-gram drafts.
    """
    drafted = completion.speculation
    if drafted is None:
        return len(completion.token_ids)
    without = len(completion.token_ids) - drafted.accepted - drafted.draft_steps
    return drafted.draft_steps + max(1, without)

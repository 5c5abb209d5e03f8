"""Item 6: tokens per second of the learner's passes, against a plain loop over padded batches with the same model.

The plain loop takes the rollouts in order, in batches of a fixed number of rows that are padded to the longest row. It
computes the logits of every position. The losses of both must be equal in float32.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from bench_config import BenchConfig
from figures import Figure, figure
from torch import Tensor

from drafters.scoring import token_logprobs
from rl_loop.batching import Rollout
from rl_loop.config import TrainConfig
from rl_loop.learner.local_learner import LocalLearner, load_policy
from rl_loop.learner.policy_learner import Example
from rollout_service.evaluation.prompts import read_prompts

GOAL = 1.5
MEAN_TOKENS, SIGMA = 75.5, 0.35
"""mean length of the demo's responses (deploy/demo/models/README.md), and standard deviation of its logarithm"""


def learner(config: BenchConfig) -> tuple[list[Figure], Any]:
    plan = config.learner
    rollouts = rollouts_of(config)
    train = train_config(config, "bfloat16")
    ours = LocalLearner(train, load_policy(plan.model))
    plain = PlainLoop(train, load_policy(plan.model), plan.batch_rows)
    _check_losses(config, rollouts)
    old = [scores.logprobs for scores in ours.logprobs(rollouts)]
    examples = examples_of(rollouts, old)
    arms: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "logprob": (lambda: ours.logprobs(rollouts), lambda: plain.logprobs(rollouts)),
        "train": (lambda: ours.train(examples, step=0), lambda: plain.train(examples)),
    }
    tokens = sum(len(rollout) for rollout in rollouts)
    figures, details = [], {}
    for name, both in arms.items():
        seconds: tuple[list[float], list[float]] = [], []
        for round in range(1 + plan.rounds):
            for run, into in zip(both, seconds, strict=True):
                began = time.perf_counter()
                run()
                if round > 0:  # the first warms up
                    into.append(time.perf_counter() - began)
        ratios = [b / a for a, b in zip(*seconds, strict=True)]
        figures.append(figure("learner", f"{name} pass against a plain loop", "x", ratios, goal=GOAL))
        details[name] = {"tokens": tokens, "learner": seconds[0], "plain": seconds[1]}
    return figures, details


def train_config(config: BenchConfig, dtype: str) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "model": config.learner.model,
            "dtype": dtype,
            "max_tokens_per_microbatch": 8192,
            "task": {"kind": "reasoning_gym", "name": "chain_sum"},
            "sampling": {"temperature": 1.0, "max_tokens": 160},
        }
    )


def rollouts_of(config: BenchConfig) -> list[Rollout]:
    plan, draw = config.learner, np.random.default_rng(0)
    prompts = read_prompts(plan.model, config.prompts)
    lengths = draw.lognormal(np.log(MEAN_TOKENS) - SIGMA**2 / 2, SIGMA, plan.rollouts).clip(8, 160).astype(int)
    return [
        Rollout(
            prompts[i // plan.completions % len(prompts)], draw.integers(2, 100, length).tolist(), [0.0] * int(length)
        )
        for i, length in enumerate(lengths)
    ]


def examples_of(rollouts: Sequence[Rollout], old: Sequence[Tensor]) -> list[Example]:
    """The rollouts as training examples, half of them with advantage 1 and half with -1."""
    return [Example(r, (-1.0) ** i, o) for i, (r, o) in enumerate(zip(rollouts, old, strict=True))]


def _check_losses(config: BenchConfig, rollouts: Sequence[Rollout]) -> None:
    """Ends the program if the two losses of an update differ by more than 1e-5.

    Losses are in float32. The old log-probabilities are changed a little, so that the loss is not zero.
    """
    train, some = train_config(config, "float32"), list(rollouts[:32])
    ours = LocalLearner(train, load_policy(config.learner.model))
    plain = PlainLoop(train, load_policy(config.learner.model), config.learner.batch_rows)
    old = [scores.logprobs + 0.1 * torch.sin(scores.logprobs) for scores in ours.logprobs(some)]
    examples = examples_of(some, old)
    difference = abs(ours.train(examples, step=0).loss - plain.train(examples))
    if difference > 1e-5:
        raise SystemExit(f"learner: the loss differs from the plain loop's by {difference:.2g}, more than 1e-5")


class PlainLoop:
    """A trainer without optimisations: GRPO's loss, averaged over tokens."""

    def __init__(self, config: TrainConfig, policy: Any, rows: int):
        self.config, self.policy, self.rows = config, policy.eval(), rows
        self.optimiser = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate)

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        with torch.no_grad():
            return [logprobs for batch in self._batches(rollouts) for logprobs in self._forward(batch)]

    def train(self, examples: Sequence[Example]) -> float:
        tokens, total = sum(len(e.rollout.response_ids) for e in examples), 0.0
        self.optimiser.zero_grad()
        for batch in self._batches(examples):
            logprobs = self._forward([example.rollout for example in batch])
            loss = torch.zeros(())
            for example, new in zip(batch, logprobs, strict=True):
                ratio = (new - example.old_logprobs).exp()
                clipped = ratio.clamp(1 - self.config.loss.clip_low, 1 + self.config.loss.clip_high)
                loss = loss - torch.minimum(ratio * example.advantage, clipped * example.advantage).sum() / tokens
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm)
        self.optimiser.step()
        return total

    def _batches(self, items: Sequence[Any]) -> Iterator[Any]:
        for start in range(0, len(items), self.rows):
            yield items[start : start + self.rows]

    def _forward(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        width = max(len(rollout) for rollout in rollouts)
        tokens_BT = torch.zeros(len(rollouts), width, dtype=torch.long)
        mask_BT = torch.zeros_like(tokens_BT)
        for row, rollout in enumerate(rollouts):
            tokens_BT[row, : len(rollout)] = torch.tensor(rollout.prompt_ids + rollout.response_ids)
            mask_BT[row, : len(rollout)] = 1
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            logits_BTV = self.policy(input_ids=tokens_BT, attention_mask=mask_BT, use_cache=False).logits
        logprobs_BT = token_logprobs(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten(), 1.0)
        logprobs_BT = logprobs_BT.view(len(rollouts), -1)
        return [logprobs_BT[row, len(r.prompt_ids) - 1 : len(r) - 1] for row, r in enumerate(rollouts)]

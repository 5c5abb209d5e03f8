"""Costs of a run's policy and drafter by their configurations, for the batch sizes that a step goes through."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from drafters.cost_report import CostReport, Step, cost_report
from drafters.registry import KINDS, DrafterConfig
from rl_loop.config import TrainConfig
from rl_loop.reports.metrics import StepMetrics
from rollout_service.client import RolloutClient

GROWTH = 4
"""each batch size is this many times the one before, as in the engines' own measurement of their steps"""


class Served(NamedTuple):
    """What the service says about its engines."""

    dtype: str
    drafter: DrafterConfig


def served(client: RolloutClient, config: TrainConfig) -> Served:
    """Of a drafter with a checkpoint of its own, only `online_drafter.model` says which: the service does not."""
    dtype, drafters = client.weights().dtype, client.speculation().drafters
    if not drafters:
        return Served(dtype, DrafterConfig())
    kind, online = drafters[0].drafter, config.online_drafter
    model = online.model if kind == online.kind and KINDS[kind].has_folder else None
    return Served(dtype, DrafterConfig(kind=kind, model=model, draft_tokens=drafters[0].draft_tokens, schedule="fixed"))


def run_costs(
    config: TrainConfig, policy: Path, serves: Served | None, prompt_tokens: float, steps: Sequence[StepMetrics]
) -> CostReport:
    """At a context of a prompt (`prompt_tokens`, mean) and half of a response. `serves`: None for a replay, which
    decodes nothing."""
    context = prompt_tokens + float(np.mean([m.response_length for m in steps])) / 2
    if serves is None:
        return cost_report(policy, [], context=context, dtype=None)
    sizes = batch_sizes(config.prompts_per_step * config.completions)
    decoding = [Step(serves.drafter.kind, serves.drafter, size) for size in sizes]
    return cost_report(policy, decoding, context=context, dtype=serves.dtype)


def batch_sizes(completions: int) -> list[int]:
    """A step's decoding begins with all its completions, or as many as the engines run at a time, and ends with one."""
    sizes = [1]
    while sizes[-1] * GROWTH < completions:
        sizes.append(sizes[-1] * GROWTH)
    return [*sizes, completions]

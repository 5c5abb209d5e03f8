"""The acceptance length of drafters whose weights are in a format, predicted by forward passes of the policy."""

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from pydantic import BaseModel
from transformers import PreTrainedModel

from drafters.drafter import DraftSampling
from drafters.exploration.candidates import Candidate
from drafters.exploration.config import FormatsConfig, QuantisedDrafter
from drafters.exploration.quantised_model import LinearInputs, eager_experts, matrices, quantise_weights
from drafters.learners.learner import DrafterLearner
from drafters.learners.small_model import DraftModel
from drafters.training.expected_acceptance import acceptance_by_sampling
from drafters.training.samples import Sample

SELF = "self"
"""the policy itself as its drafter"""


class AcceptanceRow(BaseModel):
    """A drafter in a format, as `acceptance.json` has it."""

    drafter: str
    """self, or the kind of a trained drafter"""
    model: str | None = None
    """its checkpoint, if that is its own"""
    format: str | None
    """None for the weights as they are"""
    bits: float | None
    activations: bool
    """whether what the weights are multiplied with is in the format too"""
    draft_tokens: int
    draft_sampling: DraftSampling
    acceptance_length: float
    acceptance_by_position: list[float]
    """shares of draft steps that accept at least 1, 2, ... tokens"""


def self_drafter(policy: PreTrainedModel) -> DraftModel:
    """A copy of the policy as its own drafter: a draft model, which reads only tokens."""
    return DraftModel(copy.deepcopy(policy)).eval()


def quantised(learner: DrafterLearner, candidate: Candidate, keep: Collection[str]) -> DrafterLearner:
    """A copy of a drafter with its matrices in a format."""
    learner = copy.deepcopy(learner)
    quantise_weights(learner, candidate.quantise, keep)
    return learner


def quantised_activations(learner: DrafterLearner, candidate: Candidate, keep: Collection[str]) -> LinearInputs:
    """While it is entered, what these matrices are multiplied with is in the format."""
    eager_experts(learner)
    return LinearInputs(matrices(learner, keep), lambda _, x: candidate.quantise(x))


def acceptance_rows(
    learner: DrafterLearner,
    policy: PreTrainedModel,
    samples: list[Sample],
    candidates: Sequence[Candidate],
    config: FormatsConfig,
    drafter: QuantisedDrafter | None,
) -> Iterator[AcceptanceRow]:
    """A row for the drafter as it is, and one in each format, for each way to sample drafts.

    `drafter` is what `learner` is in the configuration; None for the policy itself.
    """
    for candidate in (None, *candidates):
        in_format = learner if candidate is None else quantised(learner, candidate, config.keep)
        inputs: AbstractContextManager[Any] = nullcontext()
        if candidate is not None and config.activations:
            inputs = quantised_activations(in_format, candidate, config.keep)
        with inputs:
            predicted = acceptance_by_sampling(
                in_format, policy, samples, config.draft_tokens, config.draft_sampling, temperature=config.temperature
            )
        for draft_sampling, by_position in predicted.items():
            yield AcceptanceRow(
                drafter=SELF if drafter is None else drafter.kind,
                model=None if drafter is None else drafter.model,
                format=None if candidate is None else candidate.name,
                bits=None if candidate is None else candidate.bits,
                activations=candidate is not None and config.activations,
                draft_tokens=config.draft_tokens,
                draft_sampling=draft_sampling,
                acceptance_length=1.0 + sum(by_position),
                acceptance_by_position=by_position,
            )

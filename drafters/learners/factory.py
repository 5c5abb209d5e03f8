"""Learners by kind: a new one for a policy, or the one in a checkpoint folder.

A learner is in evaluation mode and stays in it during training. An engine drafts without dropout, so a drafter learns
without dropout, even if its configuration declares some (an MTP head has the policy's `attention_dropout`).
"""

import importlib
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedModel

from drafters.learners.learner import DrafterLearner
from drafters.registry import LEARNERS, HeadShape, LearnerKind


def learner_class(kind: LearnerKind) -> type[DrafterLearner]:
    module, _, name = LEARNERS[kind].partition(":")
    return getattr(importlib.import_module(module), name)


def new_learner(
    kind: LearnerKind, policy: PreTrainedModel, shape: HeadShape, texts: Iterable[list[int]]
) -> DrafterLearner:
    """An untrained drafter. It will learn from `texts` (token ids).

    Raises ValueError for a kind or a shape that the policy's architecture cannot have.
    """
    return learner_class(kind).new(policy, shape, texts).eval()


def load_learner(kind: LearnerKind, folder: Path, policy: PreTrainedModel) -> DrafterLearner:
    """The drafter in `folder`, which is the drafter's own folder, or the policy's if its checkpoint holds the drafter.

    Raises ValueError that says what the folder lacks, or why the drafter does not fit the policy.
    """
    return learner_class(kind).from_folder(folder, policy).eval()

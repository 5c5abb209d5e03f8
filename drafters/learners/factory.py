"""Learners by kind: new ones for a policy, and those in a checkpoint folder.

All are in evaluation mode, and stay in it while they are trained. An engine drafts without dropout, so a drafter learns
without it, although its configuration may declare some; an MTP head has the policy's `attention_dropout`.
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
    """A drafter that has not learned yet, and will from `texts` (token ids).

    Raises ValueError for a kind or a shape that the policy's architecture cannot have.
    """
    return learner_class(kind).new(policy, shape, texts).eval()


def load_learner(kind: LearnerKind, folder: Path, policy: PreTrainedModel) -> DrafterLearner:
    """The drafter in `folder`: its own, or the policy's whose checkpoint it is part of.

    Raises ValueError saying what the folder lacks or why it does not fit the policy.
    """
    return learner_class(kind).from_folder(folder, policy).eval()

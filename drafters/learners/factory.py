"""Learners by kind: new ones for a policy, and those in a checkpoint folder.

All are in evaluation mode, and stay in it while they are trained. An engine drafts without dropout, so a drafter learns
without it, although its configuration may declare some; an MTP head has the policy's `attention_dropout`.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from drafters.files.checkpoint_folder import read_tensors
from drafters.kinds.mtp import is_mtp
from drafters.learners.eagle3_head import Eagle3Head, default_layers, frequent_tokens
from drafters.learners.layouts import load_eagle3
from drafters.learners.learner import DrafterLearner
from drafters.learners.mtp_head import MTPHead
from drafters.learners.shape import HeadShape, LearnerKind
from drafters.learners.small_model import DraftModel


def new_learner(
    kind: LearnerKind, policy: PreTrainedModel, shape: HeadShape, texts: Iterable[list[int]]
) -> DrafterLearner:
    """A drafter that has not learned yet. `texts` (token ids) choose the reduced vocabulary of an Eagle3 head.

    Raises ValueError for a kind that the policy's architecture cannot have.
    """
    config: Any = policy.config
    if kind == "mtp":
        return MTPHead.from_policy(policy).eval()
    if kind == "draft_model":
        hidden_size = shape.hidden_size or max(32, config.hidden_size // 64 * 32)
        return DraftModel.from_policy(policy, hidden_size, shape.layers).eval()
    layers = tuple(sorted(shape.policy_layers)) or default_layers(config.num_hidden_layers)
    if len(set(layers)) != len(layers) or not all(0 <= i <= config.num_hidden_layers for i in layers):
        raise ValueError(
            f"head.policy_layers: {list(layers)} must be different ids from 0 to {config.num_hidden_layers}"
        )
    size = shape.vocabulary_size
    reduced = frequent_tokens(texts, size, config.vocab_size) if 0 < size < config.vocab_size else None
    return Eagle3Head.from_policy(policy, layers, reduced, shape.intermediate_size).eval()


def load_learner(kind: LearnerKind, folder: Path, policy: PreTrainedModel) -> DrafterLearner:
    """The drafter in `folder` (for mtp: a policy's folder with the head in it).

    Raises ValueError saying what the folder lacks or why it does not fit the policy.
    """
    if kind == "eagle3":
        return load_eagle3(folder, policy).eval()
    if kind == "draft_model":
        return DraftModel.from_folder(folder, policy).eval()
    head, tensors = MTPHead(policy.config), read_tensors(folder, is_mtp)
    if not tensors:
        raise ValueError(f"{folder} holds no MTP head (no tensor `mtp.*`)")
    try:
        head.load_checkpoint(tensors)
    except (KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: the MTP head does not fit the policy: {error}") from error
    return head.eval()

"""Training of the demo's three drafters: their shapes and folders. The training itself is that of `drafters train`.

All three learn from the same samples of the shipped policy, whose weights are rounded to bfloat16. So they draft for
exactly the policy that is served.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from drafters.learners.factory import load_learner, new_learner
from drafters.registry import HeadShape, LearnerKind
from drafters.training.config import OfflineTraining
from drafters.training.expected_acceptance import predicted_acceptance
from drafters.training.offline import OfflineTrainer, train_offline
from drafters.training.samples import Sample

DRAFT_TOKENS = 3
SHAPES: dict[LearnerKind, HeadShape] = {
    "draft_model": HeadShape(hidden_size=96, layers=2),
    "eagle3": HeadShape(policy_layers=[2, 4, 6], vocabulary_size=32),
    "mtp": HeadShape(),
}
FOLDERS: dict[LearnerKind, str] = {"draft_model": "draft_model", "eagle3": "eagle3", "mtp": "policy"}


@dataclass(frozen=True)
class Demo:
    """Inputs of a drafter's training: the folder of all models, the shipped policy in float32, and samples of it."""

    models: Path
    policy: PreTrainedModel
    samples: list[Sample]


def train_demo_drafter(kind: LearnerKind, demo: Demo, held_out: list[Sample], settings: OfflineTraining) -> list[float]:
    """Trains and saves one drafter. Returns the predicted acceptance by position of the saved drafter."""
    torch.manual_seed(settings.seed)
    learner = new_learner(kind, demo.policy, SHAPES[kind], [sample.response for sample in demo.samples])
    train_offline(OfflineTrainer(learner, demo.policy, demo.samples, settings), kind)
    folder = demo.models / FOLDERS[kind]
    learner.write(folder, demo.models / "policy")
    return predicted_acceptance(load_learner(kind, folder, demo.policy), demo.policy, held_out, DRAFT_TOKENS)

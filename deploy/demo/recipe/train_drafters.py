"""The three trained drafters of the demo: what each is, how it starts, and where its files go.

All learn from the same samples of the shipped policy (weights rounded to bfloat16), so that they draft for exactly the
policy that is served.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from drafters.learners.draft_model import DraftModel
from drafters.learners.eagle3 import Eagle3Head, frequent_tokens
from drafters.learners.learner import Learner
from drafters.learners.mtp import MTPHead
from drafters.training.offline import OfflineTraining, train_offline
from drafters.training.prediction import predicted_acceptance
from drafters.training.samples import Sample

DRAFT_TOKENS = 3
EAGLE3_LAYERS = (2, 4, 6)
EAGLE3_VOCABULARY = 32


@dataclass(frozen=True)
class Demo:
    """What a drafter is made from: the shipped policy in float32, its folder, and samples of it."""

    models: Path
    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    samples: list[Sample]


def make_mtp(demo: Demo) -> tuple[Learner, Path]:
    return MTPHead.from_policy(demo.policy), demo.models / "policy" / "mtp.safetensors"


def make_eagle3(demo: Demo) -> tuple[Learner, Path]:
    vocabulary = frequent_tokens((s.response for s in demo.samples), EAGLE3_VOCABULARY, demo.policy.config.vocab_size)
    head = Eagle3Head.from_policy(demo.policy, EAGLE3_LAYERS, vocabulary)
    return head, _with_config(head.config, demo.models / "eagle3")


def make_draft_model(demo: Demo) -> tuple[Learner, Path]:
    config = Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=demo.policy.config.vocab_size,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=demo.tokenizer.eos_token_id,
        pad_token_id=demo.tokenizer.pad_token_id,
    )
    folder = demo.models / "draft_model"
    demo.tokenizer.save_pretrained(folder)
    return DraftModel(Qwen3ForCausalLM(config)), _with_config(config, folder)


MAKERS: dict[str, Callable[[Demo], tuple[Learner, Path]]] = {
    "draft_model": make_draft_model,
    "eagle3": make_eagle3,
    "mtp": make_mtp,
}


def make_drafter(kind: str, demo: Demo, held_out: list[Sample], settings: OfflineTraining) -> list[float]:
    """Train and save one drafter; returns the acceptance by position predicted for what was saved."""
    torch.manual_seed(settings.seed)
    learner, file = MAKERS[kind](demo)
    train_offline(learner, demo.policy, demo.samples, settings, kind)
    learner.save(file)
    learner.load(file)
    return predicted_acceptance(learner, demo.policy, held_out, DRAFT_TOKENS)


def write_index(folder: Path) -> None:
    """`model.safetensors.index.json` over all safetensors of a folder: vLLM loads the files that it names."""
    weight_map, size = {}, 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            weight_map |= dict.fromkeys(tensors.keys(), file.name)
        size += file.stat().st_size
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")


def _with_config(config, folder: Path) -> Path:
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    return folder / "model.safetensors"

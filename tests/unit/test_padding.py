"""Padding: a padded policy computes the same logits, and its padded heads make the same drafts."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

sys.path.append(str(Path(__file__).parents[2] / "deploy" / "bench"))

from padding import Padding, Shape, ensure_padded, largest_difference, pad_models

from drafters.files.checkpoint_folder import read_config, read_tensors
from drafters.learners.eagle3_head import Eagle3Head
from drafters.learners.factory import load_learner
from drafters.learners.learner import read_policy
from drafters.learners.mtp_head import MTPHead

STEPS, LAYERS, VOCAB_SIZE = 3, 3, 24


def small_policy():
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=LAYERS,
        layer_types=["full_attention"] * LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=2,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.2,
    )
    policy = Qwen3NextForCausalLM(config).eval()
    for name, parameter in policy.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return policy


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy with an MTP head and an Eagle3 head, all random, and all three padded."""
    source, target = tmp_path_factory.mktemp("small"), tmp_path_factory.mktemp("large")
    policy = small_policy()
    policy.save_pretrained(source / "policy", max_shard_size="1GB")
    torch.manual_seed(1)
    mtp = MTPHead.from_policy(policy)
    mtp.write(source / "policy", source / "policy", torch.float32)
    eagle3 = Eagle3Head.from_policy(policy, (1, 2, 3), [0, 1, 3, 5, 6, 7])
    for parameter in eagle3.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    eagle3.write(source / "eagle3", source / "policy", torch.float32)
    (source / "draft_model").mkdir()
    save_file({"weight": torch.ones(1)}, source / "draft_model" / "model.safetensors")
    old = policy.config
    shape = Shape(
        hidden_size=4 * old.hidden_size,
        num_hidden_layers=old.num_hidden_layers + 2,
        num_attention_heads=6 * old.num_key_value_heads,
        num_key_value_heads=2 * old.num_key_value_heads,
        moe_intermediate_size=old.moe_intermediate_size + 8,
        shared_expert_intermediate_size=old.shared_expert_intermediate_size + 4,
    )
    pad_models(source, target, shape)
    return source, target


def tokens():
    return torch.randint(0, VOCAB_SIZE, (3, 20), generator=torch.Generator().manual_seed(2))


def test_a_padded_policy_has_the_same_logits(folders):
    source, target = folders
    assert read_config(target / "policy")["hidden_size"] == 4 * read_config(source / "policy")["hidden_size"]
    assert largest_difference(source / "policy", target / "policy", tokens(), torch.float32) < 1e-5


@pytest.mark.parametrize("kind", ["mtp", "eagle3"])
@torch.no_grad()
def test_a_padded_head_makes_the_same_drafts(folders, kind):
    drafted = []
    for folder in folders:
        policy = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32).eval()
        head = load_learner(kind, folder / ("policy" if kind == "mtp" else kind), policy).float().eval()
        tokens_BT = tokens()
        drafted.append(head.draft_logprobs(tokens_BT, read_policy(policy, tokens_BT, head.policy_layers), STEPS))
    for step, (small, large) in enumerate(zip(*drafted, strict=True)):
        rows = slice(None, small.shape[1] - 1 - step)
        finite = small[:, rows].isfinite()
        torch.testing.assert_close(small[:, rows][finite], large[:, rows][finite], atol=1e-4, rtol=1e-4)


def test_padded_weights_are_not_zero(folders):
    """Added heads and units are not zero, so that they take as long to compute as the others."""
    large = read_tensors(folders[1] / "policy")
    for name in ("self_attn.q_proj", "mlp.experts.0.gate_proj", "mlp.shared_expert.up_proj"):
        tensor = large[f"model.layers.0.{name}.weight"]
        assert tensor[-1].abs().min() > 0


def test_models_are_padded_again_only_when_another_shape_is_asked_for(folders, monkeypatch, tmp_path):
    source, asked = folders[0], []
    monkeypatch.setattr("padding.pad_models", lambda source, target, shape: (asked.append(shape), pad(target, shape)))

    def pad(target, shape):
        (target / "policy").mkdir(exist_ok=True, parents=True)
        config = Padding(read_config(source / "policy"), shape).config
        (target / "policy" / "config.json").write_text(json.dumps(config))

    one, other = Shape(hidden_size=128), Shape(hidden_size=512)
    for shape in (one, one, other):
        ensure_padded(source, tmp_path, shape)
    assert asked == [one, other]


def test_a_width_that_cannot_be_exact_is_refused(folders):
    config = read_config(folders[0] / "policy")
    with pytest.raises(ValueError, match="hidden_size"):
        Padding(config, Shape(**{**Shape().model_dump(), "hidden_size": 2 * config["hidden_size"]}))

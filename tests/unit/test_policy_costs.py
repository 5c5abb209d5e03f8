"""Costs of a policy from its configuration: parameters as transformers counts them, FLOPs as torch counts them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    NemotronHConfig,
    Qwen3Config,
    Qwen3NextConfig,
)

from drafters.inspect import tensor_sizes
from drafters.kinds.eagle3 import read_eagle3_config
from drafters.kinds.mtp import is_mtp
from drafters.latent_moe import LatentMoEConfig
from drafters.learners.eagle3_head import Eagle3Head
from drafters.learners.mtp_head import MTPHead
from drafters.policy_costs import Costs, DraftCosts, policy_costs
from drafters.registry import DrafterConfig, make_drafter

MODELS = Path(__file__).parents[2] / "deploy" / "demo" / "models"
POLICY = MODELS / "policy"
SHAPE = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "head_dim": 6,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
MIXED = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 10, "shared_expert_intermediate_size": 14,
         "linear_key_head_dim": 5, "linear_value_head_dim": 7, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
         "layer_types": ["linear_attention", "full_attention", "linear_attention"]}  # fmt: skip
NEMOTRON = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "head_dim": 6, "num_attention_heads": 4,
            "num_key_value_heads": 2, "ssm_state_size": 5, "mamba_num_heads": 4, "mamba_head_dim": 6, "n_groups": 2,
            "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 10,
            "moe_shared_expert_intermediate_size": 14, "hybrid_override_pattern": "M*E-E"}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "llama, tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama, biases": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "qwen3": Qwen3Config(**SHAPE),
    "qwen3, tied, biases": Qwen3Config(**SHAPE, tie_word_embeddings=True, attention_bias=True),
    "qwen3_next": Qwen3NextConfig(**SHAPE, **MIXED),
    "latent_moe": LatentMoEConfig(**SHAPE, **MIXED, moe_latent_size=8),
    "qwen3_next, some layers dense": Qwen3NextConfig(**SHAPE, **MIXED, decoder_sparse_step=2),
    "qwen3_next, no layer a mixture": Qwen3NextConfig(**SHAPE, **MIXED | {"num_experts": 0}),
    "nemotron_h": NemotronHConfig(**NEMOTRON),
    "nemotron_h, latent": NemotronHConfig(**NEMOTRON, moe_latent_size=12),
    "nemotron_h, biases": NemotronHConfig(**NEMOTRON, moe_latent_size=12, mlp_bias=True, use_bias=True),
}


def on_meta(make):
    with torch.device("meta"):
        return make()


def parameters(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def latent() -> Qwen3NextConfig:
    """A LatentMoE policy's configuration, which is Qwen3-Next's and the width of the latent space."""
    shape = {"vocab_size": 160, "hidden_size": 192, "num_hidden_layers": 6, "layer_types": ["full_attention"] * 6,
             "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 16,
             "num_experts_per_tok": 5, "moe_intermediate_size": 128}  # fmt: skip
    config = Qwen3NextConfig(**shape, shared_expert_intermediate_size=128)
    config.moe_latent_size = 64
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_that_transformers_counts(name):
    model = on_meta(lambda: AutoModelForCausalLM.from_config(CONFIGS[name]))
    assert policy_costs(CONFIGS[name]).parameters == parameters(model)


def counted_flops(config, tokens: int) -> tuple[dict[str, int], Any]:
    """FLOPs of a forward pass by torch's operators, and the model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.arange(tokens)[None], use_cache=False)
    return {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}, model


@pytest.mark.parametrize("name", ["llama", "llama, tied", "qwen3", "qwen3, tied, biases"])
@pytest.mark.parametrize("tokens", [1, 16])
def test_flops_of_a_dense_model_are_those_that_torch_counts(name, tokens):
    counted, _ = counted_flops(CONFIGS[name], tokens)
    # Attention without a fused kernel computes all pairs of tokens, so each token attends to all of them.
    assert sum(counted.values()) == tokens * policy_costs(CONFIGS[name]).flops_per_token(tokens)


@pytest.mark.parametrize("name", ["qwen3_next, no layer a mixture", "qwen3_next", "nemotron_h, latent"])
def test_weights_of_a_mixture_multiply_as_often_as_torch_counts(name):
    """Without convolutions, which torch counts for padding too, and recurrences, which transformers computes in
    chunks."""
    counted, model = counted_flops(CONFIGS[name], tokens=5)
    convolutions = sum(parameters(module) for module in model.modules() if isinstance(module, torch.nn.Conv1d))
    biases = sum(m.bias.numel() for m in model.modules() if isinstance(m, torch.nn.Conv1d) and m.bias is not None)
    costs = policy_costs(CONFIGS[name])
    assert counted["aten.mm"] == 5 * 2 * (costs.matrices - (convolutions - biases) + costs.chosen)


def test_the_demos_policy_has_what_its_files_hold():
    costs = policy_costs(AutoConfig.from_pretrained(POLICY))
    assert costs.parameters == sum(n for name, n in tensor_sizes(POLICY).items() if not is_mtp(name)) == 1_984_704
    assert costs.active_parameters == costs.parameters, "both of its experts are chosen"
    head = make_drafter(DrafterConfig(kind="mtp")).costs(AutoConfig.from_pretrained(POLICY))
    assert head.first.parameters == sum(n for name, n in tensor_sizes(POLICY).items() if is_mtp(name))


def test_a_latent_policys_experts_have_the_latent_width_and_its_projections_are_always_active():
    by_hand = {
        "embedding and output head": 2 * 160 * 192,
        "attention": 6 * (192 * 2 * 128 + 2 * 192 * 64 + 128 * 192 + 2 * 32),
        "router, of the full hidden state": 6 * 192 * 16,
        "latent projections": 6 * 2 * 192 * 64,
        "shared expert and its gate": 6 * (3 * 192 * 128 + 192),
        "norms": 13 * 192,
    }
    expert = 3 * 64 * 128
    costs = policy_costs(latent())
    assert costs.active_parameters == sum(by_hand.values()) + 6 * 5 * expert
    assert costs.parameters == sum(by_hand.values()) + 6 * 16 * expert
    assert round(costs.parameters / 1e6, 2) == 3.62
    assert round(costs.active_parameters / 1e6, 2) == 2.00


def test_a_step_reads_the_experts_that_some_token_chooses_and_every_sequences_cache():
    costs = Costs(matrices=1000, experts=800, chosen=200, cached=6, state=50)
    assert costs.step_bytes(1, context=0, element=4) == 4 * (1000 + 200 + 50)
    assert costs.step_bytes(2, context=10, element=4) == 4 * (1000 + 350 + 2 * (60 + 50)), "1 - (3/4)^2 of 800 is 350"
    assert costs.step_bytes(1, context=10, element=4, tokens=2) == 4 * (1000 + 350 + 60 + 50), "one cache, two tokens"
    assert costs.step_bytes(1000, context=0, element=2) == 2 * (1000 + 800 + 1000 * 50)


def test_the_expected_number_of_experts_is_that_of_uniform_choices():
    torch.manual_seed(0)
    drawn = torch.rand(4000, 12, 16).topk(5).indices  # 12 tokens, each with 5 of 16 experts
    distinct = torch.zeros(4000, 16).scatter_(1, drawn.flatten(1), 1.0).sum(1).mean().item()
    read = Costs(experts=16_000, chosen=5_000).step_bytes(12, context=0, element=1)
    assert read / 1000 == pytest.approx(distinct, abs=0.02), "standard error 0.007"


def test_keys_and_values_are_as_long_as_a_cache_of_transformers():
    config = CONFIGS["qwen3"]
    model = AutoModelForCausalLM.from_config(config).eval()
    cache = model(input_ids=torch.zeros(1, 7, dtype=torch.long), use_cache=True).past_key_values
    assert 7 * policy_costs(config).cached == sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)


def test_a_recurrent_state_is_as_large_as_a_cache_of_transformers():
    config = CONFIGS["qwen3_next"]
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    cache = model(input_ids=torch.zeros(1, 7, dtype=torch.long), use_cache=True).past_key_values
    linear = [layer for layer in cache.layers if hasattr(layer, "recurrent_states")]
    assert len(linear) == 2
    kernel = config.linear_conv_kernel_dim
    kept = sum(layer.recurrent_states[0].numel() for layer in linear)
    # Of the convolution's inputs, transformers keeps one more than the next token needs.
    kept += sum(layer.conv_states[0].numel() * (kernel - 1) // kernel for layer in linear)
    assert policy_costs(config).state == kept


def test_an_mtp_head_is_a_layer_of_the_policy_and_borrows_its_output_head():
    policy = CONFIGS["qwen3_next"]
    first, later = make_drafter(DrafterConfig(kind="mtp")).costs(policy)
    assert first == later
    assert first.parameters == parameters(on_meta(lambda: MTPHead(policy)))
    assert first.borrowed == policy.vocab_size * policy.hidden_size


@pytest.mark.parametrize("variants", [{}, {"norm_before_fc": True}, {"fc_norm": True}])
def test_an_eagle3_head_fuses_hidden_states_in_its_first_pass_only(variants, tmp_path):
    published = json.loads((MODELS / "eagle3" / "config.json").read_text()) | variants
    (tmp_path / "config.json").write_text(json.dumps(published))
    first, later = make_drafter(DrafterConfig(kind="eagle3", model=str(tmp_path))).costs(
        AutoConfig.from_pretrained(POLICY)
    )
    head = on_meta(lambda: Eagle3Head(read_eagle3_config(tmp_path, 6), list(range(32))))
    assert first.parameters == parameters(head)
    fusion = [module for name, module in head.named_children() if name in ("fc", "fc_norm", "input_norm")]
    assert later.parameters == parameters(head) - sum(map(parameters, fusion))


def test_drafts_read_the_first_pass_once_and_the_later_one_for_each_further_token():
    passes = DraftCosts(Costs(matrices=100), Costs(matrices=30, cached=1))
    assert [passes.draft_bytes(2, 10, 4, k) for k in (1, 3)] == [400, 400 + 2 * 4 * (30 + 20)]


def test_drafters_without_weights_cost_nothing_and_a_draft_model_what_a_policy_does():
    policy = AutoConfig.from_pretrained(POLICY)
    assert make_drafter(DrafterConfig(kind="ngram")).costs(policy) is None
    own = MODELS / "draft_model"
    first, later = make_drafter(DrafterConfig(kind="draft_model", model=str(own))).costs(policy)
    model = on_meta(lambda: AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(own)))
    assert first.parameters == later.parameters == parameters(model)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (AutoConfig.for_model("gpt2"), "no formulas for 'gpt2', only for llama, qwen3,"),
        (Qwen3Config(use_sliding_window=True, max_window_layers=2, sliding_window=8), "sliding attention"),
    ],
)
def test_an_architecture_without_formulas_is_named_and_not_guessed(config, said):
    with pytest.raises(ValueError, match=said):
        policy_costs(config)

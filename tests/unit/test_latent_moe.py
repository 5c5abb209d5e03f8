"""The family `latent_moe`: what it computes, what its checkpoints hold, the paper's designs, and its MTP head."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen3NextConfig

import drafters.latent_moe
from drafters.latent_moe import LatentMoEConfig, LatentMoEForCausalLM
from drafters.latent_moe.config import latent_design
from drafters.latent_moe.model import LatentMoEBlock
from drafters.learners.mtp_head import MTPHead
from drafters.training.config import OfflineTraining
from drafters.training.offline import OfflineTrainer, train_offline
from drafters.training.samples import Sample

REPOSITORY = Path(__file__).resolve().parents[2]
SHAPE = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "layer_types": ["full_attention"] * 2, "num_experts": 6,
    "num_experts_per_tok": 2, "moe_latent_size": 8, "moe_intermediate_size": 4, "shared_expert_intermediate_size": 4,
    "pad_token_id": 0, "num_nextn_predict_layers": 1,
}  # fmt: skip


@pytest.fixture
def policy():
    torch.manual_seed(0)
    return LatentMoEForCausalLM(LatentMoEConfig(**SHAPE)).float().eval()


def test_the_block_is_the_papers_formula():
    """y = U sum_i p_i E_i(V x) + g(x) S(x), token by token, with the router on the full hidden state."""
    torch.manual_seed(0)
    block = LatentMoEBlock(LatentMoEConfig(**SHAPE))
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    x_BTD = torch.randn(2, 3, 16)
    silu = nn.functional.silu
    expected = []
    for x in x_BTD.reshape(-1, 16):
        probabilities, chosen = (block.gate.weight @ x).softmax(0).topk(2)
        z, routed = block.fc1_latent_proj.weight @ x, torch.zeros(8)
        for p, expert in zip(probabilities / probabilities.sum(), chosen, strict=True):
            gate, up = (block.experts.gate_up_proj[expert] @ z).chunk(2)
            routed += p * (block.experts.down_proj[expert] @ (silu(gate) * up))
        shared = block.shared_expert
        s = shared.down_proj.weight @ (silu(shared.gate_proj.weight @ x) * (shared.up_proj.weight @ x))
        expected.append(block.fc2_latent_proj.weight @ routed + torch.sigmoid(block.shared_expert_gate.weight @ x) * s)
    assert torch.allclose(block(x_BTD).reshape(-1, 16), torch.stack(expected), atol=1e-5)


def test_every_matrix_of_a_new_policy_is_random_the_routers_too(policy):
    """transformers leaves zeros where a block without weights of its own should fill its router."""
    deviations = {name: p.std().item() for name, p in policy.named_parameters() if p.dim() > 1}
    assert {name: std for name, std in deviations.items() if not 0.012 < std < 0.028} == {}


def test_a_checkpoint_holds_each_expert_in_the_latent_space_and_is_read_without_trusted_remote_code(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    block = "model.layers.1.mlp"
    assert {name: tuple(tensors[f"{block}.{name}.weight"].shape) for name in ("gate", "experts.5.up_proj")} == {
        "gate": (6, 16), "experts.5.up_proj": (4, 8),
    }  # fmt: skip
    assert tensors[f"{block}.fc1_latent_proj.weight"].shape == (8, 16)
    assert tensors[f"{block}.fc2_latent_proj.weight"].shape == (16, 8)
    assert AutoConfig.from_pretrained(tmp_path).moe_latent_size == 8
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.arange(10)[None]
    assert torch.equal(again(tokens).logits, policy(tokens).logits)


def test_its_tokenizer_is_read_without_a_warning(policy, tmp_path, caplog):
    policy.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(REPOSITORY / "deploy/demo/models/policy").save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tmp_path)
    assert "latent_moe" not in caplog.text


def test_gradients_reach_the_router_the_projections_and_the_chosen_experts(policy):
    policy(torch.arange(12)[None], labels=torch.arange(12)[None]).loss.backward()
    block = policy.model.layers[0].mlp
    for parameter in (block.gate.weight, block.fc1_latent_proj.weight, block.fc2_latent_proj.weight):
        assert parameter.grad.abs().sum() > 0
    assert block.experts.gate_up_proj.grad.abs().sum() > 0


def test_gradient_checkpointing_changes_no_gradient(policy):
    def gradients():
        policy.zero_grad()
        policy.train()(torch.arange(12)[None], labels=torch.arange(12)[None], use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in policy.parameters()]

    plain = gradients()
    policy.gradient_checkpointing_enable()
    assert all(torch.allclose(one, other, atol=1e-7) for one, other in zip(plain, gradients(), strict=True))


@pytest.mark.parametrize(("design", "active"), [("efficient", 6), ("accurate", 24)])
def test_a_design_is_the_papers(design, active):
    """The paper's 95B-8B: 128 experts, 6 active, of width 2688 in 4096 become 512 in a space of 1024 at alpha = 4."""
    mixture = Qwen3NextConfig(hidden_size=4096, num_experts=128, num_experts_per_tok=6, moe_intermediate_size=2688)
    latent = latent_design(mixture, design, 4)
    assert (latent.model_type, latent.moe_latent_size, latent.num_experts) == ("latent_moe", 1024, 512)
    assert (latent.num_experts_per_tok, latent.moe_intermediate_size, latent.hidden_size) == (active, 2688, 4096)
    assert AutoConfig.for_model("latent_moe").__class__ is type(latent)


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (8, "alpha: 8 is above 4. The paper finds no loss up to 4"),
        (3, "alpha: 3 must be 2 or more and divide hidden_size = 2048"),
        (1, "alpha: 1 must be 2 or more"),
    ],
)
def test_an_alpha_that_loses_quality_or_does_not_divide_is_refused(alpha, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        latent_design(Qwen3NextConfig(), "accurate", alpha)


def test_an_alpha_of_8_can_be_forced():
    assert latent_design(Qwen3NextConfig(), "accurate", 8, force=True).moe_latent_size == 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 7}, "num_experts_per_tok: 7 of num_experts = 6 cannot be active"),
        ({"moe_latent_size": 0}, "moe_latent_size: 0 is below 1"),
        ({"num_experts": 0}, "num_experts: 0 is below 1"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_by_the_fields_name(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LatentMoEConfig(**SHAPE | change)


def test_its_mtp_head_has_experts_in_the_latent_space_and_comes_back_from_its_checkpoint(policy):
    head = MTPHead.from_policy(policy)
    checkpoint = head.checkpoint()
    assert checkpoint["mtp.layers.0.mlp.experts.5.gate_proj.weight"].shape == (4, 8)
    assert checkpoint["mtp.layers.0.mlp.fc1_latent_proj.weight"].shape == (8, 16)
    assert torch.equal(checkpoint["mtp.layers.0.mlp.gate.weight"], policy.model.layers[1].mlp.gate.weight)
    other = MTPHead(policy.config)
    other.load_checkpoint(checkpoint)
    assert all(torch.equal(one, two) for one, two in zip(head.parameters(), other.parameters(), strict=True))


def test_its_mtp_head_is_trained_projections_and_router_too(policy):
    head, samples = MTPHead.from_policy(policy), [Sample([3, 4, 5], [6, 7, 11, 20, 5, 1]) for _ in range(4)]
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    losses = train_offline(
        OfflineTrainer(head, policy, samples, OfflineTraining(steps=12, batch_size=4, warmup=1)), "mtp"
    )
    assert losses[-1] < losses[0]
    after = head.state_dict()
    assert [name for name, tensor in before.items() if torch.equal(tensor, after[name])] == []


def test_whoever_reads_a_policy_through_transformers_makes_the_family_known_first():
    """The adapters cannot: they need nothing of the drafters."""
    assert drafters.latent_moe.MODEL_TYPE == "latent_moe"
    asks = re.compile(r"\bAuto(Config|Model\w*|Tokenizer)\.from_(pretrained|config)\(")
    files = [file for room in ("drafters", "rollout_service", "rl_loop") for file in (REPOSITORY / room).rglob("*.py")]
    reading = [file for file in files if asks.search(file.read_text()) and "adapters" not in file.parts]
    assert len(reading) > 5
    assert [str(file) for file in reading if "import drafters.latent_moe" not in file.read_text()] == []

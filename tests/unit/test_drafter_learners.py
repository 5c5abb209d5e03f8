"""Drafter learners: the unroll equals drafting step by step, and checkpoints have vLLM's names and shapes."""

import pytest
import rl_toys as toys
import torch
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

from drafters.learners import unroll as unroll_module
from drafters.learners.eagle3_head import Eagle3Head, frequent_tokens
from drafters.learners.learner import DrafterLearner, final_norm, read_policy
from drafters.learners.mtp_head import MTPHead
from drafters.learners.small_model import DraftModel
from drafters.training.config import OfflineTraining
from drafters.training.losses import DraftDistance
from drafters.training.offline import OfflineTrainer, draft_loss, train_offline
from drafters.training.samples import Sample, collate

VOCAB, LAYERS, STEPS = 24, 3, 3
EAGLE3_LAYERS = (1, 2, 3)
VOCABULARY = [0, 1, 5, 6, 7, 11, 20, 23]


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=LAYERS,
        layer_types=["full_attention"] * LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
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
    return Qwen3NextForCausalLM(config).eval()


def make_learner(kind: str, policy) -> DrafterLearner:
    torch.manual_seed(1)
    if kind == "mtp":
        return MTPHead.from_policy(policy)
    if kind == "eagle3":
        head = Eagle3Head.from_policy(policy, EAGLE3_LAYERS, VOCABULARY)
        for parameter in head.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        return head
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        tie_word_embeddings=False,
        initializer_range=0.2,
        pad_token_id=0,
    )
    return DraftModel(Qwen3ForCausalLM(config))


def step_by_step(head: DrafterLearner, tokens: torch.Tensor, policy, row: int, monkeypatch) -> list[torch.Tensor]:
    """What the output head reads for one row's drafts, made as an engine makes them: known tokens first, then one query
    a step, causal all along."""
    states: list[torch.Tensor] = []

    def decode(step, tokens_BT, hidden_BTD, steps):
        known = row + 1
        positions, keys = torch.arange(known), DynamicCache()
        out, hidden = step(
            tokens_BT[:, 1 : known + 1], hidden_BTD[:, :known], positions, positions[:, None] >= positions, keys
        )
        states.append(out[:, -1])
        for j in range(1, steps):
            everything = torch.ones(1, known + j, dtype=torch.bool)
            token, position = tokens_BT[:, known + j : known + j + 1], torch.tensor([row + j])
            out, hidden = step(token, hidden[:, -1:], position, everything, keys)
            states.append(out[:, -1])
        return states

    with monkeypatch.context() as patch:
        patch.setattr(f"{type(head).__module__}.unroll", decode)
        head.draft_states(tokens, policy, STEPS)
    return states


@pytest.mark.parametrize("kind", ["mtp", "eagle3"])
def test_unrolled_rows_equal_a_step_by_step_decode(kind, policy, monkeypatch):
    head, tokens = make_learner(kind, policy), torch.randint(2, VOCAB, (2, 12))
    outputs = read_policy(policy, tokens, head.policy_layers)
    unrolled = head.draft_states(tokens, outputs, STEPS)
    for row in range(tokens.shape[1] - 1 - STEPS):
        for j, literal in enumerate(step_by_step(head, tokens, outputs, row, monkeypatch)):
            torch.testing.assert_close(unrolled[j][:, row], literal, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["mtp", "eagle3"])
def test_a_plain_causal_mask_would_be_another_drafter(kind, policy, monkeypatch):
    """Rows would see states of later steps of earlier rows, which an engine does not have."""
    head, tokens = make_learner(kind, policy), torch.randint(2, VOCAB, (2, 12))
    outputs = read_policy(policy, tokens, head.policy_layers)
    right = head.draft_states(tokens, outputs, STEPS)

    def causal(step, tokens_BT, hidden_BTD, steps):
        def plain(tokens_BT, hidden_BTD, positions_T, mask_TK, keys):
            blocks = mask_TK.shape[1] // mask_TK.shape[0]
            return step(tokens_BT, hidden_BTD, positions_T, mask_TK[:, : len(mask_TK)].repeat(1, blocks), keys)

        return unroll_module.unroll(plain, tokens_BT, hidden_BTD, steps)

    monkeypatch.setattr(f"{type(head).__module__}.unroll", causal)
    wrong = head.draft_states(tokens, outputs, STEPS)
    torch.testing.assert_close(wrong[0], right[0])
    difference = (wrong[1] - right[1])[:, : tokens.shape[1] - 2].abs().amax()
    assert difference > 0.05


def test_the_draft_model_proposes_from_its_own_next_token_distribution(policy):
    learner, tokens = make_learner("draft_model", policy), torch.randint(2, VOCAB, (1, 8))
    steps = learner.draft_logprobs(tokens, read_policy(policy, tokens), STEPS)
    own = learner.model(input_ids=tokens[:, :6]).logits.log_softmax(-1)  # row 3 at step 1 knows tokens 0..5
    torch.testing.assert_close(steps[1][:, 3], own[:, -1])


@pytest.mark.parametrize("architecture", ["qwen3_next", "nemotron_h"])
def test_hidden_states_are_those_entering_a_layer_or_leaving_the_last(architecture, policy):
    policy = policy if architecture == "qwen3_next" else toys.nemotron_h()
    tokens = torch.randint(2, policy.config.vocab_size, (1, 5))
    outputs = read_policy(policy, tokens, (0, 2, policy.config.num_hidden_layers))
    hidden = policy(input_ids=tokens, output_hidden_states=True).hidden_states
    torch.testing.assert_close(outputs.layers_BTD[0], hidden[0])
    torch.testing.assert_close(outputs.layers_BTD[1], hidden[2])
    torch.testing.assert_close(final_norm(policy)(outputs.layers_BTD[2]), outputs.output_BTD)
    torch.testing.assert_close(
        outputs.head.logprobs(outputs.output_BTD), policy(input_ids=tokens).logits.log_softmax(-1)
    )


@pytest.mark.parametrize("kind", ["mtp", "eagle3", "draft_model"])
def test_training_lowers_the_loss_and_leaves_the_policy_alone(kind, policy):
    learner, before = make_learner(kind, policy), {n: p.clone() for n, p in policy.state_dict().items()}
    samples = [Sample([3, 4, 5], [6, 7, 11, 20, 5, 1]) for _ in range(4)]
    settings = OfflineTraining(steps=12, batch_size=4, warmup=1)
    losses = train_offline(OfflineTrainer(learner, policy, samples, settings), kind)
    assert losses[-1] < losses[0]
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items())


def test_every_trained_tensor_gets_a_gradient(policy):
    for kind in ("mtp", "eagle3"):
        head, batch = make_learner(kind, policy), collate([Sample([3, 4], [6, 7, 11, 20, 5, 1])])
        outputs = read_policy(policy, batch.tokens_BT, head.policy_layers)
        draft_loss(
            head, outputs, batch, draft_steps=3, step_decay=0.8, distance=DraftDistance("soft_cross_entropy")
        ).backward()
        assert [name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()] == []


BLOCK = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "post_attention_layernorm"]


def test_mtp_checkpoint_has_the_names_and_shapes_of_qwen3_next(policy):
    shapes = {name: tuple(tensor.shape) for name, tensor in make_learner("mtp", policy).checkpoint().items()}
    outer = ["fc", "norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding"]
    block = [*BLOCK, "input_layernorm", "self_attn.q_norm", "self_attn.k_norm", "mlp.gate", "mlp.shared_expert_gate"]
    block += [f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")]
    block += [f"mlp.experts.{e}.{part}_proj" for e in range(2) for part in ("gate", "up", "down")]
    assert set(shapes) == {f"mtp.{n}.weight" for n in outer} | {f"mtp.layers.0.{n}.weight" for n in block}
    assert shapes["mtp.fc.weight"] == (32, 64)
    assert shapes["mtp.layers.0.self_attn.q_proj.weight"] == (2 * 2 * 16, 32)  # query and gate
    assert shapes["mtp.layers.0.mlp.experts.1.gate_proj.weight"] == (16, 32)
    assert shapes["mtp.layers.0.mlp.experts.1.down_proj.weight"] == (32, 16)


def test_eagle3_checkpoint_has_the_names_and_shapes_of_vllm(policy):
    tensors = make_learner("eagle3", policy).checkpoint()
    block = [*BLOCK, "input_layernorm", "hidden_norm", *(f"mlp.{part}_proj" for part in ("gate", "up", "down"))]
    assert set(tensors) == {"fc.weight", "norm.weight", "lm_head.weight", "d2t"} | {
        f"midlayer.{n}.weight" for n in block
    }
    assert tensors["fc.weight"].shape == (32, 96)
    assert tensors["midlayer.self_attn.q_proj.weight"].shape == (32, 64)
    assert tensors["lm_head.weight"].shape == (len(VOCABULARY), 32)
    assert tensors["d2t"].dtype == torch.int64
    assert [i + offset for i, offset in enumerate(tensors["d2t"].tolist())] == VOCABULARY


def test_eagle3_cannot_draft_outside_its_vocabulary(policy):
    head, tokens = make_learner("eagle3", policy), torch.randint(2, VOCAB, (1, 6))
    logprobs = head.draft_logprobs(tokens, read_policy(policy, tokens, head.policy_layers), 1)[0][0, 0]
    assert torch.isfinite(logprobs).nonzero().flatten().tolist() == VOCABULARY
    assert logprobs.exp().sum().item() == pytest.approx(1.0)


def test_eagle3_vocabulary_is_the_most_frequent_tokens_in_ascending_order():
    assert frequent_tokens([[7, 7, 3], [9, 7, 3]], 2, 10) == [3, 7]
    assert frequent_tokens([[7]], 3, 10) == [0, 1, 7]


@pytest.mark.parametrize("kind", ["mtp", "eagle3", "draft_model"])
def test_saved_and_loaded_learners_are_the_same(kind, policy, tmp_path):
    first, second = make_learner(kind, policy), make_learner(kind, policy)
    for parameter in second.parameters():
        parameter.data.add_(1.0)
    first.save(tmp_path / "head.safetensors", torch.float32)
    second.load(tmp_path / "head.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))

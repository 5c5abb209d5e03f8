"""The learner, compared with plain forward passes of the same model, sequence by sequence."""

import pytest
import rl_toys as toys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, OPTConfig, Qwen3Config

from drafters.scoring import SurprisalSums, join_scores
from rl_loop.batching import BATCH_COST, Rollout
from rl_loop.learner.gradient_checkpointing import recompute_layers
from rl_loop.learner.local_learner import LocalLearner
from rl_loop.learner.padding import padded_batches
from rl_loop.learner.policy_learner import Example

MODELS = {"llama": toys.llama, "qwen3_next": toys.qwen3_next}


@pytest.fixture
def rollouts() -> list[Rollout]:
    return toys.rollouts()


def plain_logprobs(model, rollout: Rollout, temperature: float) -> torch.Tensor:
    tokens = torch.tensor([rollout.prompt_ids + rollout.response_ids])
    logprobs = (model(input_ids=tokens).logits[0, :-1] / temperature).log_softmax(-1)
    return logprobs.gather(1, tokens[0, 1:, None]).squeeze(1)[len(rollout.prompt_ids) - 1 :]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("budget", [1, 20, 1000])
def test_logprobs_equal_a_plain_forward_of_each_sequence(model, budget, rollouts, tmp_path):
    policy = MODELS[model]()
    settings = toys.config(tmp_path, max_tokens_per_microbatch=budget, sampling={"temperature": 0.7})
    scores = LocalLearner(settings, policy).logprobs(rollouts)
    for score, rollout in zip(scores, rollouts, strict=True):
        expected = plain_logprobs(policy, rollout, 0.7)
        torch.testing.assert_close(score.logprobs, expected.detach(), atol=1e-5, rtol=1e-5)


def test_padded_batches_keep_the_budget_and_every_row_once(rollouts):
    batches = padded_batches(rollouts, 20)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(rollouts)))
    assert all(batch.blocks[0].tokens_BT.numel() <= 20 for batch in batches)
    assert len(padded_batches(rollouts, 1)) == len(rollouts), "a row longer than the budget is alone in its batch"


def test_rows_share_a_block_until_their_padding_costs_more_than_another_batch():
    rollouts = [Rollout([1], [2] * length, []) for length in (399, 299, 249, 239, 9)]
    batches = padded_batches(rollouts, 10_000)
    assert [batch.rows for batch in batches] == [[0, 1, 2], [3, 4]]  # padding of 250 and 230; with a fourth row 410
    for batch in batches:
        assert (~batch.blocks[0].real_BT).sum() <= BATCH_COST


def examples(learner: LocalLearner, rollouts: list[Rollout]) -> list[Example]:
    advantages = [1.0, -0.5, 0.0, 2.0, -1.0]
    torch.manual_seed(2)
    old = [score.logprobs + 0.1 * torch.randn(len(score.logprobs)) for score in learner.logprobs(rollouts)]
    references = learner.reference_logprobs(rollouts)
    return [Example(*row) for row in zip(rollouts, advantages, old, references, strict=True)]


def gradient(learner: LocalLearner) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in learner.policy.parameters()])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kl_coefficient", [0.0, 0.5])
def test_microbatching_does_not_change_the_gradient(model, kl_coefficient, rollouts, tmp_path):
    gradients, losses = [], []
    for budget in (1, 25, 1000):
        changes = {"max_tokens_per_microbatch": budget, "kl_coefficient": kl_coefficient, "max_grad_norm": 1e9}
        reference = MODELS[model](seed=1) if kl_coefficient else None
        learner = LocalLearner(toys.config(tmp_path, **changes), MODELS[model](), reference)
        losses.append(learner.train(examples(learner, rollouts), step=0).loss)
        gradients.append(gradient(learner))
    scale = gradients[0].abs().max()
    assert scale > 0.0
    for other in gradients[1:]:
        assert (other - gradients[0]).abs().max() <= 1e-5 * scale  # float32 sums differ by their order
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)


def test_the_gradient_is_that_of_the_token_mean_of_reinforce_when_on_policy(rollouts, tmp_path):
    learner = LocalLearner(toys.config(tmp_path, max_grad_norm=1e9), toys.llama())
    advantages = [1.0, -0.5, 0.0, 2.0, -1.0]
    old = [score.logprobs for score in learner.logprobs(rollouts)]
    update = learner.train([Example(*row) for row in zip(rollouts, advantages, old, strict=True)], step=0)
    plain = toys.llama()
    tokens = sum(response for _, response in toys.SHAPES)
    terms = zip(advantages, rollouts, strict=True)
    (-sum(a * plain_logprobs(plain, rollout, 1.0).sum() for a, rollout in terms) / tokens).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in plain.parameters()])
    torch.testing.assert_close(gradient(learner), expected, atol=1e-6, rtol=1e-5)
    assert update.policy_ratio == pytest.approx(1.0, abs=1e-5)
    assert update.clip_fraction == 0.0
    assert update.grad_norm == pytest.approx(expected.norm().item(), rel=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_gradient_checkpointing_does_not_change_the_gradient(model, rollouts, tmp_path):
    gradients = []
    for checkpointing in (False, True):
        learner = LocalLearner(toys.config(tmp_path, gradient_checkpointing=checkpointing), MODELS[model]())
        learner.train(examples(learner, rollouts), step=0)
        gradients.append(gradient(learner))
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def test_gradient_checkpointing_computes_every_layer_again_only_in_the_backward_pass(rollouts, tmp_path):
    computed = []
    for checkpointing in (False, True):
        learner = LocalLearner(toys.config(tmp_path, gradient_checkpointing=checkpointing), toys.llama())
        calls = []
        for layer in learner.policy.model.layers:
            layer.self_attn.register_forward_pre_hook(lambda *_, calls=calls: calls.append(torch.is_grad_enabled()))
        learner.train(examples(learner, rollouts), step=0)
        computed.append((calls.count(False), calls.count(True)))
    (scored, trained), (scored_again, recomputed) = computed
    assert scored_again == scored
    assert recomputed == 2 * trained


SIZES = {"vocab_size": toys.VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = SIZES | {"intermediate_size": 48, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": None}
CHANGED_BY_TRAINING_MODE = {
    "attention dropout": lambda: Qwen3Config(**SMALL, attention_dropout=0.3),
    "noise on the inputs of experts": lambda: MixtralConfig(**SMALL, num_local_experts=2, router_jitter_noise=0.5),
    "dropout and skipping in the layers themselves": lambda: OPTConfig(
        **SIZES, ffn_dim=48, dropout=0.3, layerdrop=0.5, word_embed_proj_dim=32
    ),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("what", CHANGED_BY_TRAINING_MODE)
def test_the_first_update_trains_the_policy_that_was_scored(what, checkpointing, rollouts, tmp_path):
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(CHANGED_BY_TRAINING_MODE[what]()).train()
    torch.nn.init.normal_(policy.get_output_embeddings().weight, std=0.5)  # so that small changes of states show
    learner = LocalLearner(toys.config(tmp_path, gradient_checkpointing=checkpointing), policy)
    old = [score.logprobs for score in learner.logprobs(rollouts)]
    advantages = [1.0, -1.0, 1.0, -1.0, 1.0]
    update = learner.train([Example(*row) for row in zip(rollouts, advantages, old, strict=True)], step=0)
    assert update.policy_ratio == pytest.approx(1.0, abs=1e-5)
    assert update.policy_kl == pytest.approx(0.0, abs=1e-6)
    assert update.clip_fraction == 0.0


def test_a_policy_without_layers_to_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="gradient_checkpointing: Linear has no layers that can be checkpointed"):
        recompute_layers(torch.nn.Linear(1, 1))


def test_minibatches_and_epochs_give_the_configured_number_of_updates(rollouts, tmp_path):
    learner = LocalLearner(toys.config(tmp_path, minibatches=2, epochs=3), toys.llama())
    learner.train(examples(learner, rollouts), step=0)
    assert learner.optimiser.state[next(learner.policy.parameters())]["step"].item() == 6


def test_the_learning_rate_warms_up(rollouts, tmp_path):
    learner = LocalLearner(toys.config(tmp_path, warmup_steps=4, learning_rate=1e-3), toys.llama())
    rates = [learner.train(examples(learner, rollouts), step=step).learning_rate for step in (0, 1, 3, 9)]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 1e-3, 1e-3])


@pytest.mark.parametrize(("temperature", "is_lossless"), [(1.0, True), (1.1, False)])
def test_z_distinguishes_samples_of_the_policy_from_those_at_a_wrong_temperature(temperature, is_lossless, tmp_path):
    policy = toys.llama()
    drawn = toys.sample(policy, [1, 2, 3], n=400, max_tokens=30, temperature=temperature, seed=3)
    scores = LocalLearner(toys.config(tmp_path), policy).logprobs([Rollout([1, 2, 3], ids, lp) for ids, lp in drawn])
    assert (abs(SurprisalSums.of(join_scores(scores)).z) < 4.0) is is_lossless


@pytest.mark.parametrize("model", [toys.qwen3_next, toys.nemotron_h, toys.llama, lambda: toys.llama(tied=True)])
def test_pushed_tensors_are_those_of_save_pretrained(model, tmp_path):
    policy = model()
    policy.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    pushed = LocalLearner(toys.config(tmp_path), policy).export(torch.float32)
    assert pushed.keys() == saved.keys()
    assert all(torch.equal(pushed[name], saved[name]) for name in saved)


def test_pushed_tensors_have_the_dtype_that_the_service_wants(tmp_path):
    tensors = LocalLearner(toys.config(tmp_path), toys.qwen3_next()).export(torch.bfloat16)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert any(".experts.1." in name for name in tensors), "each expert has its own tensors"

"""Router replay, compared with plain forward passes of the same policy whose routers are told their experts."""

from dataclasses import replace

import numpy as np
import pytest
import rl_toys as toys
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from drafters.latent_moe import LatentMoEConfig, LatentMoEForCausalLM
from rl_loop.batching import Rollout
from rl_loop.learner.local_learner import LocalLearner
from rl_loop.learner.policy_learner import Example
from rl_loop.learner.router_replay import check_routers
from rl_loop.loops.prompts import group_requests
from rl_loop.preflight import PreflightError, check_router_replay
from rl_loop.tasks import TaskProblem
from rollout_service.config import EngineConfig
from rollout_service.engine.mixture import check_mixture
from rollout_service.http.admission import Admission, Refused
from rollout_service.protocol import Completion, GroupRequest, RolloutRequest, RoutedExperts

EXPERTS, ACTIVE, LAYERS = 8, 3, 2
SHAPES = [(3, 5), (7, 2), (2, 9), (5, 1), (3, 4)]  # prompt and response lengths; the first and last share a prompt


def latent_moe(first_layer="full_attention", experts=EXPERTS, active=ACTIVE, seed=0):
    torch.manual_seed(seed)
    config = LatentMoEConfig(
        vocab_size=toys.VOCAB_SIZE, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, layer_types=[first_layer, "full_attention"], linear_key_head_dim=8,
        linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, num_experts=experts,
        num_experts_per_tok=active, moe_latent_size=16, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        pad_token_id=None, bos_token_id=None, eos_token_id=toys.EOS, initializer_range=0.3,
    )  # fmt: skip
    policy = LatentMoEForCausalLM(config).float().eval()
    for gate in gates(policy):
        torch.nn.init.normal_(gate.weight, std=0.5)
    return policy


POLICIES = {"packed": latent_moe, "padded": lambda: latent_moe("linear_attention")}


def gates(policy):
    return [layer.mlp.gate for layer in policy.model.layers]


def tell(gate, experts_TK):
    """Write the router anew: softmax, the weights of these experts, normalised."""

    def forward(hidden_states):
        scores_TN = (hidden_states.reshape(-1, 32) @ gate.weight.T).softmax(-1)
        weights_TK = torch.stack([row[chosen] for row, chosen in zip(scores_TN, experts_TK, strict=True)])
        return scores_TN.log(), weights_TK / weights_TK.sum(-1, keepdim=True), experts_TK

    gate.forward = forward


def told_logprobs(policy, rollout, experts_TLK):
    """Of the response's tokens, in a plain forward pass of one sequence without its last token."""
    tokens = torch.tensor([rollout.prompt_ids + rollout.response_ids])
    for layer, gate in enumerate(gates(policy)):
        tell(gate, torch.from_numpy(experts_TLK[:, layer].astype(np.int64)))
    try:
        logprobs = policy(input_ids=tokens[:, :-1]).logits[0].log_softmax(-1)
    finally:
        for gate in gates(policy):
            del gate.forward
    return logprobs.gather(1, tokens[0, 1:, None]).squeeze(1)[len(rollout.prompt_ids) - 1 :]


def own_experts(policy, rollout):
    """What the policy's routers choose: uint8 (T, L, K), without the last token."""
    chosen, hooks = [], []
    for gate in gates(policy):
        hooks.append(gate.register_forward_hook(lambda _, inputs, output: chosen.append(output[-1])))
    with torch.no_grad():
        policy(input_ids=torch.tensor([rollout.prompt_ids + rollout.response_ids]))
    for hook in hooks:
        hook.remove()
    return torch.stack(chosen, dim=1)[:-1].to(torch.uint8).numpy()


def other_experts(rollout, seed):
    draw = np.random.default_rng(seed)
    return np.array(
        [[draw.permutation(EXPERTS)[:ACTIVE] for _ in range(LAYERS)] for _ in range(len(rollout) - 1)], np.uint8
    )


@pytest.fixture
def rollouts():
    torch.manual_seed(1)
    draw = lambda n: torch.randint(toys.VOCAB_SIZE, (n,)).tolist()  # noqa: E731
    rollouts = [Rollout(draw(prompt), draw(response), [0.0] * response) for prompt, response in SHAPES]
    rollouts[4].prompt_ids[:] = rollouts[0].prompt_ids
    return rollouts


def learner_of(policy, tmp_path, reference=None, **changes):
    return LocalLearner(toys.config(tmp_path, **{"router_replay": True, **changes}), policy, reference)


def scores(policy, rollouts, tmp_path, **changes):
    return torch.cat([s.logprobs for s in learner_of(policy, tmp_path, **changes).logprobs(rollouts)])


def gradient(learner, rollouts):
    old = [score.logprobs for score in learner.logprobs(rollouts)]
    learner.forward_backward([Example(*row) for row in zip(rollouts, [1.0, -0.5, 0.3, 2.0, -1.0], old, strict=True)])
    return {name: p.grad.clone() for name, p in learner.policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("form", POLICIES)
def test_replaying_the_policys_own_choice_changes_nothing(form, rollouts, tmp_path):
    policy = POLICIES[form]()
    own = [replace(rollout, experts=own_experts(policy, rollout)) for rollout in rollouts]
    plain = scores(policy, rollouts, tmp_path, router_replay=False)
    assert (scores(policy, own, tmp_path) - plain).abs().max() <= 1e-6
    before = gradient(learner_of(policy, tmp_path, router_replay=False), rollouts)
    after = gradient(learner_of(policy, tmp_path), own)
    for name, expected in before.items():
        assert (after[name] - expected).abs().max() <= 1e-6 + 1e-5 * expected.abs().max(), name


@pytest.mark.parametrize("form", POLICIES)
@pytest.mark.parametrize("budget", [1, 20, 1000])
def test_replaying_another_choice_gives_the_logprobs_of_that_choice_and_not_those_of_a_token_beside(
    form, budget, rollouts, tmp_path
):
    policy = POLICIES[form]()
    told = [replace(rollout, experts=other_experts(rollout, i)) for i, rollout in enumerate(rollouts)]
    replayed = scores(policy, told, tmp_path, max_tokens_per_microbatch=budget)
    with torch.no_grad():
        expected = torch.cat([told_logprobs(policy, rollout, rollout.experts) for rollout in told])
        shifted = torch.cat([told_logprobs(policy, r, np.roll(r.experts, 1, axis=0)) for r in told])
        swapped = torch.cat([told_logprobs(policy, r, r.experts[:, ::-1]) for r in told])
    assert (replayed - expected).abs().max() <= 1e-5
    assert (shifted - expected).abs().max() >= 0.1, "a shift by one token would be seen"
    assert (swapped - expected).abs().max() >= 0.1, "swapped layers would be seen"
    assert (scores(policy, told, tmp_path, router_replay=False) - expected).abs().max() >= 0.1


@pytest.mark.parametrize("form", POLICIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_is_that_of_the_told_policy_and_reaches_its_routers(form, checkpointing, rollouts, tmp_path):
    told = [replace(rollout, experts=other_experts(rollout, i)) for i, rollout in enumerate(rollouts)]
    found = gradient(learner_of(POLICIES[form](), tmp_path, gradient_checkpointing=checkpointing), told)
    plain = POLICIES[form]()
    tokens = sum(response for _, response in SHAPES)
    for advantage, rollout in zip([1.0, -0.5, 0.3, 2.0, -1.0], told, strict=True):
        (-advantage * told_logprobs(plain, rollout, rollout.experts).sum() / tokens).backward()
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            difference = (found[name] - parameter.grad).abs().max()
            assert difference <= 1e-6 + 1e-5 * parameter.grad.abs().max(), name
    assert all(found[f"model.layers.{layer}.mlp.gate.weight"].abs().max() > 1e-5 for layer in range(LAYERS))


def told_balance(policy, told):
    """How often each expert was told (L, N), over the tokens that predict a response, and the load-balancing loss."""
    chosen_LN, probabilities_LN, hooks = torch.zeros(LAYERS, EXPERTS), [0.0] * LAYERS, []

    def keep(layer, start):
        def hook(_, __, output):
            probabilities_LN[layer] = probabilities_LN[layer] + output[0][start:].exp().sum(0)

        return hook

    for rollout in told:
        start = len(rollout.prompt_ids) - 1
        hooks = [g.register_forward_hook(keep(layer, start)) for layer, g in enumerate(gates(policy))]
        told_logprobs(policy, rollout, rollout.experts)
        for hook in hooks:
            hook.remove()
        for layer in range(LAYERS):
            counts = np.bincount(rollout.experts[start:, layer].ravel(), minlength=EXPERTS)
            chosen_LN[layer] += torch.from_numpy(counts)
    tokens = sum(len(rollout.response_ids) for rollout in told)
    return chosen_LN, EXPERTS * (chosen_LN * torch.stack(probabilities_LN)).sum(1).mean() / tokens**2


@pytest.mark.parametrize("form", POLICIES)
def test_the_load_balancing_loss_counts_the_experts_that_are_replayed(form, rollouts, tmp_path):
    told = [replace(rollout, experts=other_experts(rollout, i)) for i, rollout in enumerate(rollouts)]
    learner = learner_of(POLICIES[form](), tmp_path, router_coefficient=0.3)
    balanced, plain = gradient(learner, told), gradient(learner_of(POLICIES[form](), tmp_path), told)
    policy = POLICIES[form]()
    chosen_LN, loss = told_balance(policy, told)
    (0.3 * loss).backward()
    assert learner.routing().chosen_LE.tolist() == chosen_LN.tolist()
    assert learner.routing().loss == pytest.approx(loss.item(), rel=1e-4)
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.mlp.gate.weight"
        expected = policy.get_parameter(name).grad
        torch.testing.assert_close(balanced[name] - plain[name], expected, atol=1e-6, rtol=1e-3)
        assert expected.abs().max() > 1e-4


def test_a_prompt_is_shared_where_its_experts_are_equal_and_only_there(rollouts, tmp_path):
    first, second = rollouts[0], rollouts[4]
    same = other_experts(second, 0)
    same[:3] = other_experts(first, 0)[:3]
    for experts, tokens in ((same, 3 + 5 + 4), (other_experts(second, 7), 3 + 5 + 3 + 4)):
        told = [replace(first, experts=other_experts(first, 0)), replace(second, experts=experts)]
        learner = learner_of(latent_moe(), tmp_path)
        (batch,) = learner._microbatches(told)
        assert len(batch.tokens_S) == tokens
        with torch.no_grad():
            expected = torch.cat([told_logprobs(latent_moe(), rollout, rollout.experts) for rollout in told])
        found = torch.cat([score.logprobs for score in learner.logprobs(told)])
        assert (found - expected).abs().max() <= 1e-5


def test_where_all_experts_are_active_replay_changes_nothing_whatever_their_order(rollouts, tmp_path):
    """As in the demo's policy, which has two experts."""
    policy = toys.qwen3_next(first_layer="full_attention")
    told = [replace(r, experts=np.tile(np.array([[1, 0]], np.uint8), (len(r) - 1, LAYERS, 1))) for r in rollouts]
    plain = scores(policy, rollouts, tmp_path, router_replay=False)
    assert (scores(policy, told, tmp_path) - plain).abs().max() <= 1e-6


def test_the_reference_chooses_its_own_experts(rollouts, tmp_path):
    told = [replace(rollout, experts=other_experts(rollout, i)) for i, rollout in enumerate(rollouts)]
    learner = learner_of(latent_moe(), tmp_path, latent_moe(), kl_coefficient=0.1)
    plain = scores(latent_moe(), rollouts, tmp_path, router_replay=False)
    assert torch.allclose(torch.cat(learner.reference_logprobs(told)), plain, atol=1e-6)
    assert learner.forward_backward(
        [Example(r, 0.0, s.logprobs, k) for r, s, k in
         zip(told, learner.logprobs(told), learner.reference_logprobs(told), strict=True)]
    ).reference_kl > 0.01  # fmt: skip


def test_after_replay_the_routers_are_as_they_were(rollouts, tmp_path):
    policy = latent_moe()
    learner = learner_of(policy, tmp_path)
    with pytest.raises(RuntimeError, match="out of bounds"):  # an expert that does not exist ends the pass halfway
        learner.logprobs([replace(rollouts[0], experts=other_experts(rollouts[0], 0) + EXPERTS)])
    assert all("forward" not in vars(gate) for gate in gates(policy))


def test_a_rollout_without_experts_is_refused(rollouts, tmp_path):
    told = [replace(rollouts[0], experts=other_experts(rollouts[0], 0)), rollouts[1]]
    with pytest.raises(ValueError, match="router_replay: a rollout has no routed experts to replay"):
        learner_of(latent_moe(), tmp_path).logprobs(told)


def test_policies_that_cannot_replay_are_refused_when_the_learner_is_made(tmp_path):
    with pytest.raises(ValueError, match="router_replay: LlamaForCausalLM has no routers"):
        learner_of(toys.llama(), tmp_path)
    config = DeepseekV3Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, moe_intermediate_size=16, num_hidden_layers=1,
        first_k_dense_replace=0, num_attention_heads=2, num_key_value_heads=2, n_routed_experts=8, n_group=2,
        topk_group=1, num_experts_per_tok=2, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4,
        v_head_dim=8, pad_token_id=None,
    )  # fmt: skip
    with pytest.raises(ValueError, match="does not choose its experts by one top-k"):
        check_routers(DeepseekV3ForCausalLM(config))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_experts_go_over_the_wire_and_come_back(dtype):
    experts = np.random.default_rng(0).integers(np.iinfo(dtype).max, size=(5, 2, 3)).astype(dtype)
    sent = RoutedExperts.of(experts).model_dump_json()
    received = RoutedExperts.model_validate_json(sent).array()
    assert received.dtype == dtype
    assert np.array_equal(received, experts)


def test_data_that_does_not_fit_its_shape_is_refused():
    experts = RoutedExperts.of(np.zeros((5, 2, 3), np.uint8))
    with pytest.raises(ValueError, match="cannot reshape"):
        experts.model_copy(update={"shape": (4, 2, 3)}).array()


def test_a_completion_without_experts_is_as_before():
    fields = {"index": 0, "text": "", "token_ids": [1], "logprobs": [0.0], "weight_versions": []}
    assert Completion.model_validate(fields | {"finish_reason": "stop"}).routed_experts is None


@pytest.mark.parametrize("records", [False, True])
def test_a_group_may_ask_for_experts_where_engines_record_them(records):
    class Tokenizer:
        def encode(self, text):
            return [1]

    admission = Admission("demo", Tokenizer(), 128, 600, drafting=False, openai_fields={}, routed_experts=records)
    request = RolloutRequest(groups=[GroupRequest(prompt="a", routed_experts=True)])
    if records:
        assert admission.admit(request)[0].routed_experts
        return
    with pytest.raises(Refused, match=r"launch it with engine.routed_experts = true") as refused:
        admission.admit(request)
    assert [problem.field for problem in refused.value.problems] == ["groups.0.routed_experts"]


def test_a_run_asks_for_experts_where_it_trains_on_them(tmp_path):
    def asked(split, **changes):
        problem = TaskProblem({}, prompt="a")
        (request,) = group_requests(toys.config(tmp_path, **changes), "b", split, {0: problem}, 1, seed_by="s")
        return request.routed_experts

    assert asked("train", router_replay=True)
    assert not asked("held_out", router_replay=True)
    assert not asked("train")


@pytest.mark.parametrize("served", [{}, {"routed_experts": False}, {"routed_experts": True}])
def test_a_run_that_replays_needs_a_service_that_records(served, tmp_path):
    class Client:
        def model(self):
            return served

    check_router_replay(Client(), toys.config(tmp_path))
    config = toys.config(tmp_path, router_replay=True)
    if served.get("routed_experts"):
        check_router_replay(Client(), config)
    else:
        with pytest.raises(PreflightError, match=r"router_replay: .* does not record the experts"):
            check_router_replay(Client(), config)


def test_a_service_that_cannot_record_is_refused_by_the_fields_name():
    with pytest.raises(ValueError, match="routed_experts: vLLM keeps them beside its prefix cache"):
        EngineConfig(routed_experts=True, vllm={"enable_prefix_caching": False})
    with pytest.raises(ValueError, match=r"engine.routed_experts: a policy of the type 'llama' without experts"):
        check_mixture({"model_type": "llama"})
    check_mixture({"model_type": "qwen3_next", "num_experts": 2})
    check_mixture({"model_type": "qwen3_5_moe", "text_config": {"num_experts": 8}})

"""Routing of experts: its loss against transformers', its gradient against plain autograd, and what a run reports."""

import json
import math

import pytest
import rl_toys as toys
import torch
from test_rl_learner import gradient, plain_logprobs
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.qwen3_next.modeling_qwen3_next import load_balancing_loss_func

from drafters.expert_routing import RouterReading, find_routers, reading_routers
from drafters.latent_moe import LatentMoEConfig
from rl_loop.batching import Rollout
from rl_loop.learner.local_learner import LocalLearner
from rl_loop.learner.policy_learner import Example
from rl_loop.preflight import PreflightError, check_router
from rl_loop.reports.metrics import StepMetrics
from rl_loop.reports.metrics_log import MetricsLog
from rl_loop.reports.router_plot import plot_routers

EXPERTS, CHOSEN = 4, 2
ADVANTAGES = [1.0, -0.5, 0.0, 2.0, -1.0]


def mixture(seed=0, first_layer="full_attention"):
    policy = toys.qwen3_next(seed, first_layer, experts=EXPERTS, active=CHOSEN)
    for router in find_routers(policy):  # uneven, so that a wrong f or P shows
        nn.init.normal_(router.weight, std=1.0)
    return policy


MODELS = {"packed": mixture, "padded": lambda: mixture(first_layer="linear_attention")}


@pytest.fixture
def rollouts() -> list[Rollout]:
    return toys.rollouts()


SMALL = {
    "vocab_size": toys.VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": None, "num_experts_per_tok": CHOSEN,
    "initializer_range": 0.5,
}  # fmt: skip
FAMILIES = {
    "qwen3_next": mixture,
    "qwen3_moe": lambda: of(Qwen3MoeConfig(**SMALL, head_dim=16, num_experts=EXPERTS, moe_intermediate_size=16)),
    "qwen2_moe": lambda: of(
        Qwen2MoeConfig(**SMALL, num_experts=EXPERTS, moe_intermediate_size=16, shared_expert_intermediate_size=16)
    ),
    "olmoe": lambda: of(OlmoeConfig(**SMALL, num_experts=EXPERTS)),
    "latent_moe": lambda: of(
        LatentMoEConfig(
            **SMALL,
            head_dim=16,
            num_experts=EXPERTS,
            moe_intermediate_size=16,
            moe_latent_size=16,
            shared_expert_intermediate_size=16,
            layer_types=["full_attention"] * 2,
        )
    ),
    "mixtral": lambda: of(MixtralConfig(**SMALL, num_local_experts=EXPERTS)),
}


def of(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float().eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_each_layer_is_that_of_transformers_and_leaves_padding_out(family):
    policy = FAMILIES[family]()
    tokens = torch.randint(toys.VOCAB_SIZE, (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(9) < torch.tensor([[9], [4], [6]])
    with reading_routers(find_routers(policy)) as read:
        logits = policy(input_ids=tokens, attention_mask=mask.long(), output_router_logits=True).router_logits
    real = mask.flatten().nonzero().squeeze(1)
    theirs = [load_balancing_loss_func((of_layer,), EXPERTS, CHOSEN, mask) for of_layer in logits]
    routing = read.routing(real)
    expected = torch.stack(theirs).mean()
    assert routing.loss == pytest.approx(expected.item(), rel=1e-5)
    loss = read.loss(real, routing.frequencies_LE, tokens=len(real))
    mine, plain = (torch.autograd.grad(each, logits, retain_graph=True) for each in (loss, expected))
    for one, other in zip(mine, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-4)
    assert routing.chosen_LE.sum(1).tolist() == [CHOSEN * mask.sum().item()] * len(logits)
    padded = read.routing(torch.arange(tokens.numel()))
    assert abs(padded.loss - expected.item()) > 2e-4, "padding would show"


def test_balanced_and_collapsed_routers_have_the_loss_load_and_entropy_that_they_must():
    read, cycle = RouterReading(), torch.arange(8) % EXPERTS
    even = torch.stack([cycle, (cycle + 1) % EXPERTS], 1)
    read.logits_SE = {0: torch.zeros(8, EXPERTS), 1: torch.tensor([[0.0, -99.0, 0.0, -99.0]] * 8)}
    read.chosen_SK = {0: even, 1: torch.tensor([[0, 2]] * 8)}
    routing = read.routing(torch.arange(8))
    assert routing.load_LE.tolist() == [[0.25] * 4, [0.5, 0.0, 0.5, 0.0]]
    assert routing.entropy_L.tolist() == pytest.approx([math.log(4), math.log(2)])
    assert routing.loss == pytest.approx((CHOSEN + EXPERTS) / 2), "the mean of the layers' losses"


def plain_routing_loss(policy, rollouts):
    """By transformers' own router logits, sequence by sequence without padding: the loss, the load, and the entropy."""
    rows = []
    for rollout in rollouts:
        tokens, first = torch.tensor([rollout.prompt_ids + rollout.response_ids]), len(rollout.prompt_ids) - 1
        logits = policy(input_ids=tokens, output_router_logits=True).router_logits
        rows.append([of_layer[first:-1] for of_layer in logits])
    losses, loads, entropies = [], [], []
    for of_layer in zip(*rows, strict=True):
        probabilities = torch.cat(of_layer).softmax(-1)
        chosen = nn.functional.one_hot(probabilities.topk(CHOSEN).indices, EXPERTS).sum(1).float()
        losses.append(EXPERTS * (chosen.mean(0) * probabilities.mean(0)).sum())
        loads.append((chosen.mean(0) / CHOSEN).tolist())
        entropies.append(-(probabilities * probabilities.log()).sum(1).mean().item())
    return torch.stack(losses).mean(), loads, entropies


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("budget", [1, 20, 1000])
def test_scoring_gives_the_routing_of_all_response_tokens_however_they_are_divided(model, budget, rollouts, tmp_path):
    learner = LocalLearner(toys.config(tmp_path, max_tokens_per_microbatch=budget), MODELS[model]())
    learner.logprobs(rollouts)
    loss, loads, entropies = plain_routing_loss(MODELS[model](), rollouts)
    routing = learner.routing()
    assert routing.tokens == sum(response for _, response in toys.SHAPES)
    assert routing.loss == pytest.approx(loss.item(), rel=1e-5)
    assert routing.entropy_L.tolist() == pytest.approx(entropies, rel=1e-4)
    for mine, plain in zip(routing.load_LE.tolist(), loads, strict=True):
        assert mine == pytest.approx(plain, abs=1e-6)


def learner_gradient(model, rollouts, output, **changes):
    settings = toys.config(output, router_coefficient=0.3, max_grad_norm=1e9, **changes)
    learner = LocalLearner(settings, MODELS[model]())
    old = [score.logprobs for score in learner.logprobs(rollouts)]
    learner.train([Example(*row) for row in zip(rollouts, ADVANTAGES, old, strict=True)], step=0)
    return gradient(learner)


def plain_gradient(model, rollouts):
    policy = MODELS[model]()
    tokens = sum(response for _, response in toys.SHAPES)
    terms = zip(ADVANTAGES, rollouts, strict=True)
    reinforce = -sum(a * plain_logprobs(policy, rollout, 1.0).sum() for a, rollout in terms) / tokens
    (reinforce + 0.3 * plain_routing_loss(policy, rollouts)[0]).backward()
    return torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])


def differs_by(one, other):
    return ((one - other).abs().max() / other.abs().max()).item()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("budget", [1, 25, 1000])
def test_the_gradient_is_that_of_the_whole_batch_however_it_is_divided(
    model, checkpointing, budget, rollouts, tmp_path
):
    changes = {"max_tokens_per_microbatch": budget, "gradient_checkpointing": checkpointing}
    assert differs_by(learner_gradient(model, rollouts, tmp_path, **changes), plain_gradient(model, rollouts)) < 1e-5


RIGHT = RouterReading.loss


def counting_all_tokens(read, tokens_N, frequencies_LE, *, tokens):
    return RIGHT(read, torch.arange(len(read.logits_SE[0])), frequencies_LE, tokens=tokens)


def with_the_micro_batchs_own_choices(read, tokens_N, frequencies_LE, *, tokens):
    return RIGHT(read, tokens_N, read.routing(tokens_N).frequencies_LE, tokens=tokens)


def averaged_over_the_micro_batch(read, tokens_N, frequencies_LE, *, tokens):
    return RIGHT(read, tokens_N, frequencies_LE, tokens=len(tokens_N))


def divided_by_the_number_of_micro_batches_again(read, tokens_N, frequencies_LE, *, tokens):
    return RIGHT(read, tokens_N, frequencies_LE, tokens=2 * tokens)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "wrong",
    [
        counting_all_tokens,
        with_the_micro_batchs_own_choices,
        averaged_over_the_micro_batch,
        divided_by_the_number_of_micro_batches_again,
    ],
)
def test_a_wrong_loss_would_have_another_gradient(model, wrong, rollouts, tmp_path, monkeypatch):
    monkeypatch.setattr(RouterReading, "loss", wrong)
    mine = learner_gradient(model, rollouts, tmp_path, max_tokens_per_microbatch=25)
    assert differs_by(mine, plain_gradient(model, rollouts)) > 1e-2


def test_minibatches_keep_the_choices_of_the_whole_step(rollouts, tmp_path, monkeypatch):
    seen = []

    def watched(read, tokens_N, frequencies_LE, *, tokens):
        seen.append(frequencies_LE)
        return RIGHT(read, tokens_N, frequencies_LE, tokens=tokens)

    monkeypatch.setattr(RouterReading, "loss", watched)
    learner_gradient("packed", rollouts, tmp_path, minibatches=2, epochs=2)
    whole = plain_routing_loss(mixture(), rollouts)[1]
    assert len(seen) == 4
    assert all((f / CHOSEN - torch.tensor(whole)).abs().max() < 1e-6 for f in seen)


def collapsed():
    """Each token chooses one expert. The first two have opposite logits, so that one of them is above the others' 0."""
    policy = toys.qwen3_next(0, "full_attention", experts=EXPERTS, active=1)
    for router in find_routers(policy):
        router.weight.data[1] = -router.weight.data[0]
        router.weight.data[2:] = 0.0
    return policy


def updated(output, coefficient):
    """The learner after updates without any advantage, and the load of its least chosen expert before and after."""
    draw = torch.Generator().manual_seed(3)
    rollouts = [
        Rollout([1, 2], torch.randint(toys.VOCAB_SIZE, (20,), generator=draw).tolist(), [0.0] * 20) for _ in range(20)
    ]
    settings = toys.config(output, router_coefficient=coefficient, learning_rate=1e-2)
    learner, loads = LocalLearner(settings, collapsed()), []
    for step in range(20):
        old = [score.logprobs for score in learner.logprobs(rollouts)]
        loads.append(learner.routing().load_LE.min().item() * EXPERTS)
        learner.train([Example(rollout, 0.0, score) for rollout, score in zip(rollouts, old, strict=True)], step=step)
    return learner, loads[0], loads[-1]


def test_the_loss_revives_collapsed_experts_also_where_no_example_has_an_advantage(tmp_path):
    _, before, after = updated(tmp_path, coefficient=1.0)
    assert before == 0.0
    assert after > 0.2


def test_without_the_coefficient_nothing_is_trained_for_routers(tmp_path):
    learner, before, after = updated(tmp_path, coefficient=0.0)
    assert before == after == 0.0
    assert all(torch.equal(p, q) for p, q in zip(learner.policy.parameters(), collapsed().parameters(), strict=True))


def test_a_dense_policy_has_no_routing_and_no_hooks(rollouts, tmp_path, monkeypatch):
    monkeypatch.setattr(RouterReading, "routing", None)
    learner = LocalLearner(toys.config(tmp_path), toys.llama())
    learner.logprobs(rollouts)
    assert learner.routing() is None


def test_a_dense_policy_is_refused_before_its_weights_are_read(tmp_path):
    toys.llama().config.save_pretrained(tmp_path)
    check_router(toys.config(tmp_path, model=str(tmp_path)))
    settings = toys.config(tmp_path, model=str(tmp_path), router_coefficient=0.01)
    with pytest.raises(PreflightError, match=r"router_coefficient: .* \(LlamaForCausalLM\) has no routers"):
        check_router(settings)
    mixture().config.save_pretrained(tmp_path)
    check_router(settings)


class OfMixture(toys.SamplingSource):
    """Samples from the learner's own policy. A checkpoint names experts one by one, and the module does not."""

    def publish(self, of, export, version, *, is_new=True):
        self.version = max(version, self.version) + 1
        return self.version


def test_a_run_reports_loads_and_entropies(tmp_path):
    settings = toys.config(tmp_path, steps=3, tensorboard=True, router_coefficient=0.1)
    learner = LocalLearner(settings, mixture())
    loop = toys.loop(settings, learner, OfMixture(learner.policy))
    loop.reporter.log = MetricsLog(tmp_path, 0, tensorboard=True)
    loop.run()
    loop.reporter.log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    for line in lines:
        assert [sum(loads) for loads in line["expert_load"]] == pytest.approx([1.0, 1.0], abs=1e-5)
        assert all(0.0 < entropy < math.log(EXPERTS) for entropy in line["router_entropy"])
        assert CHOSEN * 0.9 < line["router_loss"] < EXPERTS
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("train/router_loss")] == pytest.approx(
        [line["router_loss"] for line in lines]
    )
    assert [event.value for event in events.Scalars("router/least_load/layer_1")] == pytest.approx(
        [EXPERTS * min(line["expert_load"][1]) for line in lines]
    )
    plot_routers(tmp_path / "router.png", {m.step: m for m in loop.reporter.log.steps})
    assert (tmp_path / "router.png").read_bytes().startswith(b"\x89PNG")


def test_a_dense_run_has_empty_fields_and_no_curves(tmp_path):
    settings = toys.config(tmp_path, steps=1)
    loop = toys.loop(settings, LocalLearner(settings, toys.llama()), toys.SamplingSource(toys.llama()))
    loop.run()
    (metrics,) = loop.reporter.log.steps
    assert (metrics.router_loss, metrics.router_entropy, metrics.expert_load) == (None, [], [])
    assert metrics.router_curves() == {}


def test_steps_from_before_routing_was_reported_are_read(tmp_path):
    settings = toys.config(tmp_path, steps=1)
    toys.loop(settings, LocalLearner(settings, toys.llama()), toys.SamplingSource(toys.llama())).run()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    earlier = {name: value for name, value in line.items() if not name.startswith(("router_", "expert_"))}
    assert len(earlier) == len(line) - 3
    assert StepMetrics.model_validate(earlier).expert_load == []

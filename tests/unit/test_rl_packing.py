"""Packed micro-batches, compared with padded ones: sharing prompts changes no values, gradients or hidden states."""

import pytest
import rl_toys as toys
import torch
from transformers import MistralConfig, MistralForCausalLM

from drafters.learners.learner import read_policy, reading_policy
from drafters.policy_head import PolicyHead
from rl_loop.batching import MicroBatch, Rollout
from rl_loop.learner.packed_attention import can_pack, packed_attention
from rl_loop.learner.packing import packed_batches
from rl_loop.learner.padding import padded_batches

MODELS = {
    "llama": toys.llama,
    "qwen3_next": lambda: toys.qwen3_next(first_layer="full_attention"),
    "nemotron_h": toys.nemotron_h,
}
GROUPS = [(4, [3, 9, 1]), (7, [5, 2]), (2, [6])]  # length of the prompt, and of each response


@pytest.fixture
def rollouts() -> list[Rollout]:
    """The groups' completions in turn, as in a shuffled minibatch."""
    torch.manual_seed(1)
    draw = lambda n: torch.randint(toys.VOCAB_SIZE, (n,)).tolist()  # noqa: E731
    groups = [[Rollout(p, draw(n), []) for n in lengths] for p, lengths in ((draw(n), of) for n, of in GROUPS)]
    return [group[i] for i in range(3) for group in groups if i < len(group)]


def logprobs_and_gradient(model, batches: list[MicroBatch], count: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Values by rollout, and the gradient of a sum in which each token has its own weight."""
    by_row: list[torch.Tensor] = [torch.empty(0)] * count
    model.zero_grad()
    for batch in batches:
        logprobs = (
            PolicyHead(model)(batch.hidden(model)).log_softmax(-1).gather(1, batch.responses_N[:, None]).squeeze(1)
        )
        for row, part in zip(batch.rows, logprobs.split(batch.lengths), strict=True):
            (part * torch.arange(1.0, len(part) + 1) * (row + 1)).sum().backward(retain_graph=True)
            by_row[row] = part.detach()
    return by_row, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("budget", [1, 25, 1000])
def test_packed_and_padded_give_the_same_logprobs_and_gradients(model, budget, rollouts):
    policy = MODELS[model]()
    padded = logprobs_and_gradient(policy, padded_batches(rollouts, 1000), len(rollouts))
    with packed_attention(policy):
        packed = logprobs_and_gradient(policy, packed_batches(rollouts, budget), len(rollouts))
    for mine, theirs in zip(packed[0], padded[0], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    assert (packed[1] - padded[1]).abs().max() <= 1e-5 * padded[1].abs().max()


def test_each_prompt_is_computed_once_and_nothing_is_padded(rollouts):
    (batch,) = packed_batches(rollouts, 1000)
    assert len(batch.tokens_S) == sum(prompt + sum(responses) for prompt, responses in GROUPS)
    assert sorted(batch.rows) == list(range(len(rollouts)))


def test_packed_batches_keep_the_budget_and_take_group_by_group(rollouts):
    batches = packed_batches(rollouts, 25)
    assert [sorted(batch.rows) for batch in batches] == [[0, 3, 5], [1, 2, 4]]
    assert [len(batch.tokens_S) for batch in batches] == [17, 22]
    assert len(packed_batches(rollouts, 1)) == len(rollouts), "a row longer than the budget is alone in its batch"


@pytest.mark.parametrize(("model", "layers"), [("llama", (0, 1, 2)), ("nemotron_h", (0, 3, 4))])
def test_a_drafter_sees_the_hidden_states_of_a_forward_of_each_rollout(model, layers, rollouts):
    policy = MODELS[model]()
    (batch,) = packed_batches(rollouts, 1000)
    with torch.no_grad(), reading_policy(policy, layers) as read, packed_attention(policy):
        batch.hidden(policy)
        outputs = read.outputs()
    rows = iter(batch.rows)
    for block in batch.blocks:
        seen = outputs.at(block.indices_BT)
        for b in range(len(block.tokens_BT)):
            rollout = rollouts[next(rows)]
            tokens = torch.tensor([rollout.prompt_ids + rollout.response_ids])
            plain = read_policy(policy, tokens, layers)
            assert torch.equal(block.tokens_BT[b, : len(rollout)], tokens[0])
            for mine, theirs in zip((seen.output_BTD, *seen.layers_BTD), (plain.output_BTD, *plain.layers_BTD),
                                    strict=True):  # fmt: skip
                torch.testing.assert_close(mine[b, : len(rollout)], theirs[0], atol=1e-5, rtol=1e-5)


def mistral(sliding_window: int | None) -> MistralForCausalLM:
    config = MistralConfig(
        vocab_size=toys.VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=sliding_window,
    )
    return MistralForCausalLM(config)


def test_models_whose_tokens_meet_outside_full_attention_are_padded():
    assert can_pack(toys.llama())
    assert can_pack(toys.qwen3_next(first_layer="full_attention"))
    assert can_pack(mistral(sliding_window=None))
    assert not can_pack(mistral(sliding_window=8))
    assert not can_pack(toys.qwen3_next())
    assert can_pack(toys.nemotron_h())
    assert not can_pack(toys.nemotron_h(first_layer="linear_attention"))
    eager = toys.llama()
    eager.set_attn_implementation("eager")
    assert not can_pack(eager)

"""The recomputation in float64: no operation of transformers rounds to float32 within it."""

import pytest
import rl_toys as toys
import torch

from rollout_service.evaluation.cut import Cut
from rollout_service.evaluation.exact_policy import Recomputation, Response
from rollout_service.evaluation.float64 import InFloat64

POLICIES = {
    "llama": toys.llama,
    "a mixture": lambda: toys.qwen3_next(first_layer="full_attention", experts=8, active=2),
    "a recurrent layer": toys.qwen3_next,
}


@torch.no_grad()
@pytest.mark.parametrize("policy", POLICIES)
def test_what_float32_rounds_is_kept(policy):
    """A change of a weight below the precision of float32 moves the logits smoothly: half the change, half the move."""
    torch.manual_seed(0)
    model = POLICIES[policy]().double().eval()
    model.set_experts_implementation("eager")
    tokens = torch.randint(3, toys.VOCAB_SIZE, (1, 12))
    embedding = model.get_input_embeddings().weight
    before = embedding.clone()

    def moved(by):
        embedding.copy_(before + by * torch.linspace(-1, 1, before.numel(), dtype=torch.float64).view_as(before))
        return model(input_ids=tokens).logits

    with InFloat64():
        start = moved(0.0)
        whole, half = moved(1e-9) - start, moved(5e-10) - start
    assert torch.allclose(whole, 2 * half, rtol=1e-3, atol=1e-14)
    start = moved(0.0)
    whole, half = moved(1e-9) - start, moved(5e-10) - start
    assert not torch.allclose(whole, 2 * half, rtol=1e-3, atol=1e-14), "transformers rounds to float32 somewhere"


def test_the_recomputation_in_float64_is_the_same_policy(tmp_path):
    torch.manual_seed(0)
    POLICIES["a mixture"]().save_pretrained(tmp_path)
    recomputation = Recomputation(tmp_path)
    exact = recomputation.in_float64()
    assert recomputation.in_float64() is exact
    assert (recomputation.dtype, exact.dtype) == (torch.float32, torch.float64)
    response = Response([3, 1, 4], [1, 5, 9, 2])
    (scores,), (margins,) = recomputation.scores_and_margins([response], Cut())
    (exactly,), (exact_margins,) = exact.scores_and_margins([response], Cut())
    assert 0 < (scores.sampled_logprobs - exactly.sampled_logprobs).abs().max() < 1e-5
    assert exact_margins.dtype == torch.float64
    assert torch.allclose(margins.double(), exact_margins, atol=1e-6)

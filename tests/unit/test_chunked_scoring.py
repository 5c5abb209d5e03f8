"""Logits a chunk at a time: the same scores and gradients as at once, in memory that does not grow with the tokens."""

import pytest
import rl_toys as toys
import torch
from allocations import peak_bytes
from test_rl_learner import examples, gradient, rollouts  # noqa: F401  (rollouts is a fixture)
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from drafters import chunked_scoring
from drafters.chunked_scoring import hidden_logprobs, logits_bytes, score_hidden
from drafters.policy_head import PolicyHead
from drafters.scoring import score_tokens, token_logprobs
from rl_loop.batching import Rollout
from rl_loop.learner.local_learner import LocalLearner
from rl_loop.learner.policy_learner import Example
from rl_loop.losses.registry import LOSSES

CUTS = [{}, {"top_k": 8}, {"top_p": 0.8}, {"temperature": 0.7, "top_k": 12, "top_p": 0.9}]
SMALL = {
    "vocab_size": toys.VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
WITHOUT_GROUPS = {key: SMALL[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
HEADS = {
    "llama": toys.llama,
    "tied": lambda: toys.llama(tied=True),
    "experts": toys.qwen3_next,
    "capped logits": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=2.0)),
    "scaled logits": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.5)),
    "divided logits": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=3.0)),
    "a decoder within the model": lambda: OPTForCausalLM(
        OPTConfig(**WITHOUT_GROUPS, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4)
    ),
    "another name of the decoder": lambda: GPT2LMHeadModel(
        GPT2Config(**WITHOUT_GROUPS, n_embd=32, n_layer=2, n_head=4)
    ),
}


class Linear:
    """A head without a policy."""

    def __init__(self, vocab_size: int, width: int, dtype: torch.dtype = torch.float32):
        torch.manual_seed(0)
        self.vocab_size = vocab_size
        self.weight = torch.randn(vocab_size, width).to(dtype).requires_grad_()

    def __call__(self, hidden):
        return torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight)


@pytest.mark.parametrize("of", HEADS)
def test_the_head_gives_the_logits_of_the_whole_policy(of):
    torch.manual_seed(0)
    policy = HEADS[of]().eval()
    tokens = torch.randint(toys.VOCAB_SIZE, (1, 9))
    hidden = policy.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state[0]
    expected = policy(input_ids=tokens, use_cache=False).logits[0]
    torch.testing.assert_close(PolicyHead(policy)(hidden[2:5]), expected[2:5], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(policy(input_ids=tokens).logits[0], expected, msg="the policy is as it was")


def test_a_policy_that_does_not_call_its_decoder_is_noticed():
    policy = toys.llama()
    policy.get_decoder = lambda: torch.nn.Linear(1, 1)
    with pytest.raises(AssertionError, match="LlamaForCausalLM did not call what get_decoder"):
        PolicyHead(policy)(torch.zeros(3, 32))


@pytest.mark.parametrize("chunk", [1, 100, 1000])
@pytest.mark.parametrize("cut", CUTS)
def test_scores_are_those_of_all_logits_at_once(cut, chunk, monkeypatch):
    head, hidden, tokens = Linear(24, 8), torch.randn(50, 8), torch.randint(24, (50,))
    expected = score_tokens(head(hidden), tokens, **cut)
    monkeypatch.setattr(chunked_scoring, "CHUNK", chunk)
    scores = score_hidden(head, hidden, tokens, **cut)
    for name in ("logprobs", "sampled_logprobs", "entropy", "variance"):
        torch.testing.assert_close(getattr(scores, name), getattr(expected, name).detach(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 100, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_and_gradients_are_those_of_all_logits_at_once(chunk, dtype, monkeypatch):
    factors, found = torch.randn(50), []
    for size in (chunked_scoring.CHUNK, chunk):
        monkeypatch.setattr(chunked_scoring, "CHUNK", size)
        head = Linear(24, 8, dtype)
        hidden, tokens = torch.randn(50, 8, requires_grad=True), torch.randint(24, (50,))
        logprobs = hidden_logprobs(head, hidden, tokens, 0.7)
        (logprobs.exp() * factors).sum().backward()  # a gradient that depends on the log-probabilities
        found.append((logprobs.detach(), hidden.grad, head.weight.grad.float()))
    # In bfloat16 the parts of the weights' gradient are rounded before they are added.
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    for mine, expected in zip(found[1], found[0], strict=True):
        assert (mine - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("kl_coefficient", [0.0, 0.5])
@pytest.mark.parametrize("kind", [loss.model_fields["kind"].default for loss in LOSSES])
def test_every_loss_has_the_same_gradient_and_metrics(kind, kl_coefficient, rollouts, tmp_path, monkeypatch):  # noqa: F811
    changes = {"loss": {"kind": kind}, "kl_coefficient": kl_coefficient, "sampling": {"temperature": 0.7}}
    gradients, metrics = [], []
    for chunk in (chunked_scoring.CHUNK, 64):
        reference = toys.llama(seed=1) if kl_coefficient else None
        learner = LocalLearner(toys.config(tmp_path, **changes), toys.llama(tied=True), reference)
        batch = examples(learner, rollouts)
        batch = [Example(**{**vars(e), "weights": torch.linspace(0.5, 1.5, len(e.old_logprobs))}) for e in batch]
        monkeypatch.setattr(chunked_scoring, "CHUNK", chunk)
        metrics.append(learner.forward_backward(batch).model_dump())
        gradients.append(gradient(learner))
    scale = gradients[0].abs().max()
    assert scale > 0.0
    assert (gradients[1] - gradients[0]).abs().max() <= 1e-6 * scale
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-6, abs=1e-6)


VOCAB, WIDTH, TOKENS, CHUNK = 8192, 8, 2048, 1 << 20
CHUNK_BYTES = 4 * CHUNK
BESIDE = 4 * (3 * VOCAB * WIDTH + 16 * TOKENS * WIDTH)
"""gradients of the weights and what is added to them, and some tensors of the size of the hidden states"""


def peak_of_training(head) -> int:
    hidden, tokens = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randint(VOCAB, (TOKENS,))
    return peak_bytes(lambda: hidden_logprobs(head, hidden, tokens, 0.7).exp().sum().backward())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_takes_less_than_one_and_a_half_chunks_of_logits(dtype, monkeypatch):
    at_once = peak_of_training(Linear(VOCAB, WIDTH, dtype))
    assert at_once > 2 * 4 * TOKENS * VOCAB, "all logits are in memory more than twice"
    monkeypatch.setattr(chunked_scoring, "CHUNK", CHUNK)
    assert TOKENS * VOCAB >= 16 * CHUNK
    assert peak_of_training(Linear(VOCAB, WIDTH, dtype)) < 1.5 * CHUNK_BYTES + BESIDE


@pytest.mark.parametrize("cut", CUTS)
def test_scoring_takes_less_than_one_and_a_half_chunks_of_logits(cut, monkeypatch):
    head, hidden, tokens = Linear(VOCAB, WIDTH), torch.randn(TOKENS, WIDTH), torch.randint(VOCAB, (TOKENS,))
    with torch.no_grad():
        at_once = peak_bytes(lambda: score_tokens(head(hidden), tokens, **cut))
    assert at_once > 2 * 4 * TOKENS * VOCAB
    monkeypatch.setattr(chunked_scoring, "CHUNK", CHUNK)
    assert peak_bytes(lambda: score_hidden(head, hidden, tokens, **cut)) < 1.5 * CHUNK_BYTES + BESIDE


@pytest.mark.parametrize("tokens", [64, 128, 2048])
def test_what_logits_take_is_at_most_what_is_stated(tokens, monkeypatch):
    monkeypatch.setattr(chunked_scoring, "CHUNK", 4 * VOCAB * 64)  # 64 tokens are few, 128 are more
    hidden, responses = torch.randn(tokens, WIDTH, requires_grad=True), torch.randint(VOCAB, (tokens,))
    head = Linear(VOCAB, WIDTH)
    peak = peak_bytes(lambda: hidden_logprobs(head, hidden, responses, 1.0).sum().backward())
    assert 0.3 * logits_bytes(tokens, VOCAB) < peak < logits_bytes(tokens, VOCAB) + BESIDE


def test_a_step_of_the_learner_takes_no_more_logits_for_more_tokens(tmp_path, monkeypatch):
    """With the whole learner: micro-batches of any size score and train within the memory of one chunk."""
    monkeypatch.setattr(chunked_scoring, "CHUNK", CHUNK)
    config = toys.LlamaConfig(
        **{**SMALL, "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 8, "head_dim": 2}
    )
    learner = LocalLearner(toys.config(tmp_path, sampling={"top_k": 20}), toys.LlamaForCausalLM(config).eval())
    torch.manual_seed(0)
    drawn = [Rollout([1], torch.randint(VOCAB, (128,)).tolist(), [0.0] * 128) for _ in range(16)]

    def step():
        old = [scores.logprobs for scores in learner.logprobs(drawn)]
        learner.forward_backward([Example(r, 1.0 - i % 3, o) for i, (r, o) in enumerate(zip(drawn, old, strict=True))])

    activations = 64 * 4 * TOKENS * (WIDTH + 8)
    assert peak_bytes(step) < 1.5 * CHUNK_BYTES + 2 * BESIDE + activations < 0.5 * 4 * TOKENS * VOCAB


def test_few_logits_are_computed_once():
    calls = []

    class Counted(Linear):
        def __call__(self, hidden):
            calls.append(len(hidden))
            return super().__call__(hidden)

    hidden = torch.randn(20, 8, requires_grad=True)
    hidden_logprobs(Counted(24, 8), hidden, torch.zeros(20, dtype=torch.long), 1.0).sum().backward()
    assert calls == [20]
    expected = token_logprobs(Linear(24, 8)(hidden), torch.zeros(20, dtype=torch.long), 1.0)
    torch.testing.assert_close(hidden_logprobs(Linear(24, 8), hidden, torch.zeros(20, dtype=torch.long), 1.0), expected)

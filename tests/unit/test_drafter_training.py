"""Drafter losses and predicted acceptance, against hand-computed values and real speculative decoding."""

import math
from itertools import chain
from types import SimpleNamespace

import pytest
import torch

from drafters.learners.learner import DrafterLearner, OutputHead, PolicyOutputs
from drafters.training import expected_acceptance as prediction
from drafters.training.losses import soft_cross_entropy, total_variation
from drafters.training.samples import Sample, collate, epochs

P, Q = [0.5, 0.3, 0.2, 0.0], [0.2, 0.3, 0.1, 0.4]


def test_total_variation_by_hand():
    p, q = torch.tensor([P, P]).log(), torch.tensor([Q, P]).log()
    assert total_variation(p, q).tolist() == pytest.approx([0.4, 0.0], abs=1e-6)  # 1 - (0.2 + 0.3 + 0.1 + 0)
    disjoint = torch.tensor([[0.0, 0.0, 0.0, 1.0]]).log()
    assert total_variation(p[:1], disjoint).item() == pytest.approx(1.0)


def test_soft_cross_entropy_by_hand():
    value = soft_cross_entropy(torch.tensor([P]).log(), torch.tensor([Q]).log()).item()
    assert value == pytest.approx(-(0.5 * math.log(0.2) + 0.3 * math.log(0.3) + 0.2 * math.log(0.1)))


def test_soft_cross_entropy_has_the_gradient_of_the_forward_kl():
    logits, p = torch.randn(5, 7, dtype=torch.double, requires_grad=True), torch.randn(5, 7, dtype=torch.double)
    p = p.log_softmax(-1)
    (ours,) = torch.autograd.grad(soft_cross_entropy(p, logits.log_softmax(-1)).sum(), logits)
    kl = torch.nn.functional.kl_div(logits.log_softmax(-1), p, log_target=True, reduction="sum")
    torch.testing.assert_close(ours, torch.autograd.grad(kl, logits)[0])
    torch.testing.assert_close(ours, logits.softmax(-1).detach() - p.exp())


def test_soft_cross_entropy_on_a_reduced_vocabulary_is_smallest_at_the_renormalised_policy():
    p = torch.tensor([[0.5, 0.3, 0.2]]).log()
    logits = torch.tensor([[0.5 / 0.7, 0.2 / 0.7]]).log().requires_grad_()
    q = torch.full((1, 3), -torch.inf).index_copy(-1, torch.tensor([0, 2]), logits.log_softmax(-1))
    soft_cross_entropy(p, q).sum().backward()
    assert logits.grad.abs().max().item() < 1e-6


def test_drafted_rows_start_at_the_first_token_of_the_response_and_end_with_it():
    batch = collate([Sample([2, 3, 4], [5, 6, 7]), Sample([2], [5])])
    assert batch.tokens_BT.tolist() == [[2, 3, 4, 5, 6, 7], [2, 5, 0, 0, 0, 0]]
    # Row 2 holds the last prompt token; it knows the first token of the response and proposes the second.
    assert batch.drafted(0).nonzero().tolist() == [[0, 2], [0, 3]]
    assert batch.drafted(1).nonzero().tolist() == [[0, 2]]


def test_batches_have_a_new_order_each_epoch_and_the_same_one_for_a_seed():
    samples = [Sample([i], [i + 10]) for i in range(6)]

    def first(seed: int) -> list[list[int]]:
        batches = epochs(samples, 3, seed)
        return [next(batches).tokens_BT[:, 0].tolist() for _ in range(4)]

    assert first(1) == first(1) != first(2)
    assert sorted(chain(*first(1)[:2])) == list(range(6))
    with pytest.raises(ValueError, match="6 samples do not fill a batch of 7"):
        next(epochs(samples, 7, 0))


class Markov(DrafterLearner):
    """A drafter whose distribution depends only on the last token and the draft step."""

    kind = "markov"

    def __init__(self, tables_SVV: torch.Tensor):
        super().__init__()
        self.tables_SVV = tables_SVV

    @classmethod
    def new(cls, policy, shape, texts):
        raise NotImplementedError

    @classmethod
    def from_folder(cls, folder, policy):
        raise NotImplementedError

    def draft_states(self, tokens_BT, policy, steps):
        vocab = self.tables_SVV.shape[-1]
        last = [torch.roll(tokens_BT, -1 - j, dims=1) for j in range(steps)]
        return [torch.nn.functional.one_hot(last[j] + j * vocab, steps * vocab).float() for j in range(steps)]

    def output_head(self, policy):
        return OutputHead(self.tables_SVV.flatten(0, 1).log().T, self.tables_SVV.shape[-1])

    def checkpoint(self):
        raise NotImplementedError

    def load_checkpoint(self, tensors):
        raise NotImplementedError

    def write(self, folder, policy_folder, dtype=torch.bfloat16):
        raise NotImplementedError


@pytest.mark.parametrize("draft_sampling", ["probabilistic", "greedy"])
def test_predicted_acceptance_is_what_speculative_decoding_accepts(draft_sampling, monkeypatch):
    """Policy and drafter are Markov chains of 4 symbols, the drafter worse at each step; 20,000 draft steps decoded."""
    torch.manual_seed(0)
    vocab, k, length, chains = 4, 3, 150, 400
    policy_VV = (4 * torch.randn(vocab, vocab)).softmax(-1)
    noise_SVV = torch.rand(k, vocab, vocab)
    mixed = torch.tensor([0.2, 0.4, 0.6])[:, None, None]
    tables_SVV = (1 - mixed) * policy_VV + mixed * noise_SVV / noise_SVV.sum(-1, keepdim=True)

    def draw(probabilities: torch.Tensor) -> torch.Tensor:
        return torch.multinomial(probabilities, 1)[:, 0]

    tokens = [torch.zeros(chains, dtype=torch.long)]
    for _ in range(length):
        tokens.append(draw(policy_VV[tokens[-1]]))
    samples = [Sample(row[:1], row[1:]) for row in torch.stack(tokens, 1).tolist()]

    def read_policy(policy, tokens_BT, layers):
        states = torch.nn.functional.one_hot(tokens_BT, vocab).float()
        return PolicyOutputs(states, (), torch.zeros(0), policy_VV.log().T)

    monkeypatch.setattr(prediction, "read_policy", read_policy)
    policy, learner = SimpleNamespace(device="cpu"), Markov(tables_SVV)
    predicted = prediction.predicted_acceptance(learner, policy, samples, k, draft_sampling=draft_sampling)
    if draft_sampling == "greedy":
        tables_SVV = torch.nn.functional.one_hot(tables_SVV.argmax(-1), vocab).float()

    last, accepted, rounds = tokens[-1], torch.zeros(k), 50
    for _ in range(rounds):
        alive = torch.ones(chains, dtype=torch.bool)
        for j in range(k):
            p, q = policy_VV[last], tables_SVV[j][last]
            draft = draw(q)
            accept = torch.rand(chains) < (p / q).gather(1, draft[:, None])[:, 0]
            replaced = draw((p - q).clamp(min=1e-9))
            last = torch.where(alive, torch.where(accept, draft, replaced), last)
            alive &= accept
            accepted[j] += alive.sum()
        last = torch.where(alive, draw(policy_VV[last]), last)
    assert predicted == pytest.approx((accepted / (rounds * chains)).tolist(), abs=0.015)

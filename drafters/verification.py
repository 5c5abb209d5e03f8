"""Verification of drafts, lossless: how many drafted tokens are accepted, and which token follows them.

R requests of different draft lengths, K the longest; N drafted tokens of all requests, one request's after the other's;
V vocabulary. Of one request: drafts x_1..x_k; P_i and Q_i the target's and the drafter's distributions of x_i, given
the drafts before it; r_i = P_i(x_i) / Q_i(x_i). A deterministic draft has the one-hot Q_i.

    standard   (Leviathan et al., arXiv 2211.17192)   accept x_i with probability min(1, r_i), one after the other
    block      (Sun et al., arXiv 2403.10444)         one decision for the whole draft; accepts at least as much

Both are the law of one number, the accepted length n, and one distribution for the token after it:

    P(n >= i)      standard: product over j <= i of min(1, r_j)
                   block:    1 - product over j >= i of (1 - h_j), with
                             w_0 = 1, w_i = min(1, w_(i-1) r_i)
                             h_i = m_i / (m_i + 1 - w_i),  m_i = sum over tokens of (w_i P_(i+1) - Q_(i+1))+,  h_k = w_k
    n < k          the token is drawn from (w_n P_(n+1) - Q_(n+1))+, normalised (standard: w = 1): the residual
    n = k          the token is drawn from the target, and given as `bonus`

so two uniform numbers a request decide all. Temperature 0 is the target that is one-hot at its maximum.
A draft outside the vocabulary is no draft: Q_i is zero, which refuses it and draws its token from the target.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Verification = Literal["standard", "block"]
CHUNK = 512
"""tokens that are summed at once where one is drawn: as many chunks as tokens in one, at a large vocabulary"""


@dataclass(frozen=True)
class Drafts:
    """Example: two requests, the second without drafts: `Drafts(tensor([7, 3]), tensor([2, 0]), None)`."""

    tokens_N: Tensor
    """int64"""
    lengths_R: Tensor
    """int64, tokens drafted for each request; they add up to N"""
    probs_NV: Tensor | None
    """what each draft was drawn from; None when all are deterministic"""

    @property
    def starts_R(self) -> Tensor:
        """index of each request's first draft in N"""
        return self.lengths_R.cumsum(0) - self.lengths_R

    def padded(self, values_N: Tensor, fill: float) -> Tensor:
        """(N,) -> (R, K), `fill` past the end of a request's drafts."""
        width = int(self.lengths_R.max()) if len(self.lengths_R) else 0
        drafted_RK = torch.arange(width, device=values_N.device) < self.lengths_R[:, None]
        values_RK = values_N.new_full(drafted_RK.shape, fill)
        values_RK[drafted_RK] = values_N
        return values_RK


def target_distribution(logits_NV: Tensor, greedy_N: Tensor | None = None) -> Tensor:
    """softmax, float32 at least; one-hot at the maximum in the rows of `greedy_N` (bool), which have temperature 0.

    The logits are as they are sampled from: after temperature, top-k and top-p, tokens that are cut at -inf.
    """
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    target_NV = logits_NV.softmax(-1, dtype=dtype)
    if greedy_N is not None and bool(greedy_N.any()):
        best_N1 = logits_NV[greedy_N].argmax(-1, keepdim=True)
        target_NV[greedy_N] = torch.zeros_like(target_NV[greedy_N]).scatter_(1, best_N1, 1.0)
    return target_NV


def verify(
    target_NV: Tensor, drafts: Drafts, bonus_R: Tensor, uniforms_R2: Tensor, verification: Verification = "standard"
) -> Tensor:
    """The tokens that each request gains: its accepted drafts and one more, int64 (R, K + 1), -1 past the end.

    target_NV     distributions at the drafts' positions (`target_distribution`)
    bonus_R       int64, a sample of the target after a request's last draft: taken where all drafts are accepted
    uniforms_R2   float64 in [0, 1): the first decides the length, the second the token (`uniforms`)
    """
    survival_RK, weights_RK = survival(target_NV, drafts, verification)
    accepted_R = (uniforms_R2[:, :1] < survival_RK).sum(1)
    next_R = bonus_R.clone()
    refused = (accepted_R < drafts.lengths_R).nonzero().squeeze(1)
    if len(refused):
        accepted = accepted_R[refused]
        rows = drafts.starts_R[refused] + accepted
        residual_XV = residual(target_NV, drafts, rows, weights_RK[refused, accepted])
        next_R[refused] = inverse_cdf(residual_XV, uniforms_R2[refused, 1])
    tokens_RK1 = torch.nn.functional.pad(drafts.padded(drafts.tokens_N, -1), (0, 1), value=-1)
    columns = torch.arange(tokens_RK1.shape[1], device=tokens_RK1.device)
    tokens_RK1 = tokens_RK1.masked_fill(columns >= accepted_R[:, None], -1)
    return tokens_RK1.scatter(1, accepted_R[:, None], next_R[:, None])


def survival(target_NV: Tensor, drafts: Drafts, verification: Verification) -> tuple[Tensor, Tensor]:
    """The law of the accepted length: P(n >= 1..K) (R, K), zero past the end, and the residual's weights w_0..w_(K-1)
    (R, K)."""
    drafted_N = _at_drafts(target_NV, drafts)
    proposed_N = torch.ones_like(drafted_N) if drafts.probs_NV is None else _at_drafts(drafts.probs_NV, drafts)
    # What the drafter cannot have drawn (no draft among it) is refused: 0, not infinite.
    ratio_N = torch.where(proposed_N > 0.0, drafted_N / proposed_N, 0.0).clamp(max=torch.finfo(drafted_N.dtype).max)
    ratio_RK = drafts.padded(ratio_N, 0.0)
    if verification == "standard":
        return ratio_RK.clamp(max=1.0).cumprod(1), torch.ones_like(ratio_RK)
    # w_i = min(1, w_(i-1) r_i), all i at once: a random walk in logarithms, reflected at 0, is the walk minus its
    # running maximum.
    walk_RK = torch.nn.functional.pad(ratio_RK.log().cumsum(1), (1, 0))
    weights_RK1 = (walk_RK - walk_RK.cummax(1).values).exp()
    mass_RK = drafts.padded(_residual_mass(target_NV, drafts, weights_RK1), 0.0)
    last_R = drafts.lengths_R[:, None]
    columns = torch.arange(weights_RK1.shape[1], device=weights_RK1.device)
    stop_RK1 = torch.nn.functional.pad(mass_RK / (mass_RK + 1.0 - weights_RK1[:, :-1]), (0, 1))
    # 0 / 0: the draft cannot be refused here, so that the choice is of no consequence.
    stop_RK1 = torch.where(columns == last_R, weights_RK1, stop_RK1.nan_to_num(1.0)).masked_fill(columns > last_R, 0.0)
    go_on_RK = (1.0 - stop_RK1[:, 1:]).flip(1).cumprod(1).flip(1)
    return 1.0 - go_on_RK, weights_RK1[:, :-1]


def residual(target_NV: Tensor, drafts: Drafts, rows: Tensor, weights: Tensor) -> Tensor:
    """(w P - Q)+ at X draft rows, not normalised, (X, V): what the token that replaces a refused draft is drawn from.

    Where rounding leaves nothing of it, the target: P equals Q there.
    """
    drafted_X = drafts.tokens_N[rows]
    exists_X = (drafted_X >= 0) & (drafted_X < target_NV.shape[1])
    residual_XV = target_NV[rows].mul_(weights[:, None])
    if drafts.probs_NV is None:
        residual_XV.scatter_(1, drafted_X.where(exists_X, 0)[:, None], 0.0)
    else:
        residual_XV.sub_(drafts.probs_NV[rows]).clamp_(min=0.0)
    is_target_X = ~(exists_X & residual_XV.any(1))
    if bool(is_target_X.any()):
        residual_XV[is_target_X] = target_NV[rows[is_target_X]]
    return residual_XV


def inverse_cdf(weights_XV: Tensor, uniform_X: Tensor) -> Tensor:
    """One token a row, drawn from weights that need not be normalised, int64 (X,). A weight of 0 is never drawn.

    In two steps, the chunk and the token in it: a cumulative sum in float64 over a whole vocabulary is slow.
    """
    short = -weights_XV.shape[1] % CHUNK
    chunks_XCL = torch.nn.functional.pad(weights_XV, (0, short)).unflatten(1, (-1, CHUNK))
    mass_XC = chunks_XCL.sum(2, dtype=torch.float64)
    chunk_X, uniform_X = _bin(mass_XC, uniform_X)
    within_X, _ = _bin(chunks_XCL[torch.arange(len(chunk_X), device=chunk_X.device), chunk_X].double(), uniform_X)
    # Clamped for weights that are not numbers: the log-probabilities show it, an engine must not end by it.
    return (chunk_X * CHUNK + within_X).clamp(max=weights_XV.shape[1] - 1)


def _bin(weights_XB: Tensor, uniform_X: Tensor) -> tuple[Tensor, Tensor]:
    """The bin of each row that a uniform number falls into, and where in the bin: uniform again."""
    upper_XB = weights_XB.cumsum(1)
    total_X = upper_XB[:, -1]
    # Below the total also where the product is rounded up.
    at_X = torch.minimum(uniform_X * total_X, torch.nextafter(total_X, torch.zeros_like(total_X)))
    bin_X = torch.searchsorted(upper_XB, at_X[:, None], right=True).squeeze(1).clamp(max=weights_XB.shape[1] - 1)
    size_X = weights_XB.gather(1, bin_X[:, None]).squeeze(1)
    lower_X = upper_XB.gather(1, bin_X[:, None]).squeeze(1) - size_X
    return bin_X, ((at_X - lower_X) / size_X).clamp(0.0, 1.0)


def uniforms(count: int, generators: Mapping[int, torch.Generator], device: torch.device | str = "cpu") -> Tensor:
    """float64 (count, 2) in [0, 1); row r from `generators[r]` where there is one, else from torch's own."""
    uniforms_R2 = torch.rand(count, 2, dtype=torch.float64, device=device)
    for row, generator in generators.items():
        uniforms_R2[row].uniform_(generator=generator)
    return uniforms_R2


def _at_drafts(values_NV: Tensor, drafts: Drafts) -> Tensor:
    """Each draft's own entry (N,), 0 for drafts outside the vocabulary."""
    tokens_N = drafts.tokens_N
    exists_N = (tokens_N >= 0) & (tokens_N < values_NV.shape[1])
    return values_NV.gather(1, tokens_N.where(exists_N, 0)[:, None]).squeeze(1) * exists_N


def _residual_mass(target_NV: Tensor, drafts: Drafts, weights_RK1: Tensor) -> Tensor:
    """m_0..m_(k-1) of every request, (N,): sum over tokens of (w P - Q)+."""
    rows_RK = torch.arange(weights_RK1.shape[1] - 1, device=target_NV.device) < drafts.lengths_R[:, None]
    weights_N = weights_RK1[:, :-1][rows_RK]
    exists_N = (drafts.tokens_N >= 0) & (drafts.tokens_N < target_NV.shape[1])
    if drafts.probs_NV is None:
        return weights_N * torch.where(exists_N, 1.0 - _at_drafts(target_NV, drafts), 1.0)
    # -(Q - w P)- in one temporary: V is large.
    below_NV = torch.addcmul(drafts.probs_NV, target_NV, weights_N[:, None], value=-1.0)
    return torch.where(exists_N, -below_NV.clamp_(max=0.0).sum(1), weights_N)

"""Lossless verification of drafts: how many drafted tokens are accepted, and which token follows them.

Shapes: R requests of different draft lengths, K the longest draft, N drafted tokens of all requests in order, V
vocabulary. One request has drafts x_1..x_k. P_i and Q_i are the target's and the drafter's distributions of x_i, given
the drafts before it, and r_i = P_i(x_i) / Q_i(x_i). For a deterministic draft, Q_i is one-hot.

    standard   (Leviathan et al., arXiv 2211.17192)   accept x_i with probability min(1, r_i), one after the other
    block      (Sun et al., arXiv 2403.10444)         one decision for the whole draft; accepts at least as much

The law of the accepted length n and the distribution of the token after it define each kind of verification:

    P(n >= i)      standard: product over j <= i of min(1, r_j)
                   block:    1 - product over j >= i of (1 - h_j), with
                             w_0 = 1, w_i = min(1, w_(i-1) r_i)
                             h_i = m_i / (m_i + 1 - w_i),  m_i = sum over tokens of (w_i P_(i+1) - Q_(i+1))+,  h_k = w_k
    n < k          the token is drawn from (w_n P_(n+1) - Q_(n+1))+, normalised (standard: w = 1): the residual
    n = k          the token is drawn from the target, and given as `bonus`

So two uniform numbers for each request decide everything. At temperature 0, the target is one-hot at its maximum. A
draft outside the vocabulary has Q_i = 0: it is refused, and the token in its place is drawn from the target.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Verification = Literal["standard", "block"]
CHUNK = 512
"""tokens in a chunk when a token is drawn; a large vocabulary then has about as many chunks as a chunk has tokens"""


@dataclass(frozen=True)
class Drafts:
    """Example: two requests, the second without drafts: `Drafts(tensor([7, 3]), tensor([2, 0]), None)`."""

    tokens_N: Tensor
    """int64"""
    lengths_R: Tensor
    """int64, number of tokens drafted for each request; the sum is N"""
    probs_NV: Tensor | None
    """the distribution that each draft was drawn from; None if all drafts are deterministic"""

    @property
    def starts_R(self) -> Tensor:
        """index of each request's first draft in N"""
        return self.lengths_R.cumsum(0) - self.lengths_R

    def padded(self, values_N: Tensor, fill: float) -> Tensor:
        """Values (N,) as (R, K), with `fill` past the end of a request's drafts."""
        width = int(self.lengths_R.max()) if len(self.lengths_R) else 0
        drafted_RK = torch.arange(width, device=values_N.device) < self.lengths_R[:, None]
        values_RK = values_N.new_full(drafted_RK.shape, fill)
        values_RK[drafted_RK] = values_N
        return values_RK


def target_distribution(logits_NV: Tensor, greedy_N: Tensor | None = None) -> Tensor:
    """The softmax of the logits, in float32 or wider.

    The logits are those that are sampled from: temperature, top-k and top-p are applied, and the tokens that they cut
    are at -inf. Rows of `greedy_N` (bool) have temperature 0, and become one-hot at the maximum.
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
    """The new tokens of each request: its accepted drafts and one more token, int64 (R, K + 1), -1 past the end.

    target_NV     the target's distributions at the drafts' positions (`target_distribution`)
    bonus_R       int64, a sample of the target after a request's last draft; used if all drafts are accepted
    uniforms_R2   float64 in [0, 1): the first decides the accepted length, the second the token (`uniforms`)
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
    """The law of the accepted length, P(n >= 1..K), and the residual's weights w_0..w_(K-1).

    Both are (R, K). The probabilities are zero past the end of a draft.
    """
    drafted_N = _at_drafts(target_NV, drafts)
    proposed_N = torch.ones_like(drafted_N) if drafts.probs_NV is None else _at_drafts(drafts.probs_NV, drafts)
    # A token of probability zero under the drafter is refused: its ratio is 0, not infinite. No draft is such a token.
    ratio_N = torch.where(proposed_N > 0.0, drafted_N / proposed_N, 0.0).clamp(max=torch.finfo(drafted_N.dtype).max)
    ratio_RK = drafts.padded(ratio_N, 0.0)
    if verification == "standard":
        return ratio_RK.clamp(max=1.0).cumprod(1), torch.ones_like(ratio_RK)
    # w_i = min(1, w_(i-1) r_i) for all i at once. In logarithms this is a random walk that is reflected at 0, which
    # equals the walk minus its running maximum.
    walk_RK = torch.nn.functional.pad(ratio_RK.log().cumsum(1), (1, 0))
    weights_RK1 = (walk_RK - walk_RK.cummax(1).values).exp()
    mass_RK = drafts.padded(_residual_mass(target_NV, drafts, weights_RK1), 0.0)
    last_R = drafts.lengths_R[:, None]
    columns = torch.arange(weights_RK1.shape[1], device=weights_RK1.device)
    stop_RK1 = torch.nn.functional.pad(mass_RK / (mass_RK + 1.0 - weights_RK1[:, :-1]), (0, 1))
    # 0 / 0 occurs where the draft cannot be refused. Then the value has no effect.
    stop_RK1 = torch.where(columns == last_R, weights_RK1, stop_RK1.nan_to_num(1.0)).masked_fill(columns > last_R, 0.0)
    go_on_RK = (1.0 - stop_RK1[:, 1:]).flip(1).cumprod(1).flip(1)
    return 1.0 - go_on_RK, weights_RK1[:, :-1]


def residual(target_NV: Tensor, drafts: Drafts, rows: Tensor, weights: Tensor) -> Tensor:
    """(w P - Q)+ at X draft rows, not normalised, (X, V). The token that replaces a refused draft is drawn from it.

    Where rounding leaves only zeros, P equals Q, and the row is the target's.
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
    """One token for each row, int64 (X,), drawn from weights that need not sum to 1. A weight of 0 is never drawn.

    The draw has two steps, first the chunk and then the token in it, because a float64 cumulative sum over a whole
    vocabulary is slow.
    """
    short = -weights_XV.shape[1] % CHUNK
    chunks_XCL = torch.nn.functional.pad(weights_XV, (0, short)).unflatten(1, (-1, CHUNK))
    mass_XC = chunks_XCL.sum(2, dtype=torch.float64)
    chunk_X, uniform_X = _bin(mass_XC, uniform_X)
    within_X, _ = _bin(chunks_XCL[torch.arange(len(chunk_X), device=chunk_X.device), chunk_X].double(), uniform_X)
    # Clamped for weights that are NaN: the log-probabilities show those, and the engine must not crash.
    return (chunk_X * CHUNK + within_X).clamp(max=weights_XV.shape[1] - 1)


def _bin(weights_XB: Tensor, uniform_X: Tensor) -> tuple[Tensor, Tensor]:
    """The bin of each row that a uniform number falls into, and its place in the bin, which is uniform again."""
    upper_XB = weights_XB.cumsum(1)
    total_X = upper_XB[:, -1]
    # Keeps the number below the total even if the product is rounded up.
    at_X = torch.minimum(uniform_X * total_X, torch.nextafter(total_X, torch.zeros_like(total_X)))
    bin_X = torch.searchsorted(upper_XB, at_X[:, None], right=True).squeeze(1).clamp(max=weights_XB.shape[1] - 1)
    size_X = weights_XB.gather(1, bin_X[:, None]).squeeze(1)
    lower_X = upper_XB.gather(1, bin_X[:, None]).squeeze(1) - size_X
    return bin_X, ((at_X - lower_X) / size_X).clamp(0.0, 1.0)


def uniforms(count: int, generators: Mapping[int, torch.Generator], device: torch.device | str = "cpu") -> Tensor:
    """float64 (count, 2) in [0, 1). Row r comes from `generators[r]`; if there is none, from torch's own generator."""
    uniforms_R2 = torch.rand(count, 2, dtype=torch.float64, device=device)
    for row, generator in generators.items():
        uniforms_R2[row].uniform_(generator=generator)
    return uniforms_R2


def _at_drafts(values_NV: Tensor, drafts: Drafts) -> Tensor:
    """The entry of each draft's token (N,); 0 for drafts outside the vocabulary."""
    tokens_N = drafts.tokens_N
    exists_N = (tokens_N >= 0) & (tokens_N < values_NV.shape[1])
    return values_NV.gather(1, tokens_N.where(exists_N, 0)[:, None]).squeeze(1) * exists_N


def _residual_mass(target_NV: Tensor, drafts: Drafts, weights_RK1: Tensor) -> Tensor:
    """m_0..m_(k-1) of every request, (N,): the sum over tokens of (w P - Q)+."""
    rows_RK = torch.arange(weights_RK1.shape[1] - 1, device=target_NV.device) < drafts.lengths_R[:, None]
    weights_N = weights_RK1[:, :-1][rows_RK]
    exists_N = (drafts.tokens_N >= 0) & (drafts.tokens_N < target_NV.shape[1])
    if drafts.probs_NV is None:
        return weights_N * torch.where(exists_N, 1.0 - _at_drafts(target_NV, drafts), 1.0)
    # Computed as -(Q - w P)-, with one temporary, because V is large.
    below_NV = torch.addcmul(drafts.probs_NV, target_NV, weights_N[:, None], value=-1.0)
    return torch.where(exists_N, -below_NV.clamp_(max=0.0).sum(1), weights_N)

"""Scores of sampled tokens under the distribution that they were drawn from, and the losslessness z-score over them.

N counts tokens, V the vocabulary. A distribution is softmax(logits / temperature), cut to the top k tokens and then to
the nucleus of mass top_p, in vLLM's order.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from pydantic import BaseModel
from torch import Tensor


@dataclass(frozen=True)
class TokenScores:
    """Per token, float32 (N,)."""

    logprobs: Tensor
    """log-probabilities under softmax(logits / temperature), which training uses"""
    sampled_logprobs: Tensor
    """log-probabilities under the sampled distribution, top-k and top-p included, which a rollout reports"""
    entropy: Tensor
    """entropy of the sampled distribution in nats, which is the expected surprisal"""
    variance: Tensor
    """variance of the surprisal under the sampled distribution"""

    def cpu(self) -> "TokenScores":
        return TokenScores(*(field.cpu() for field in self._fields()))

    def split(self, lengths: list[int]) -> "list[TokenScores]":
        return [TokenScores(*parts) for parts in zip(*(f.split(lengths) for f in self._fields()), strict=True)]

    def where(self, chosen_N: Tensor) -> "TokenScores":
        """The scores of the tokens that the mask `chosen_N`, bool (N,), selects."""
        return TokenScores(*(field[chosen_N] for field in self._fields()))

    def _fields(self) -> tuple[Tensor, ...]:
        return self.logprobs, self.sampled_logprobs, self.entropy, self.variance


def join_scores(parts: Iterable[TokenScores]) -> TokenScores:
    return TokenScores(*(torch.cat(fields) for fields in zip(*(part._fields() for part in parts), strict=True)))


def token_logprobs(logits_NV: Tensor, tokens_N: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) at the tokens, float32 (N,), with gradient."""
    scaled_NV = logits_NV.float() / temperature
    return scaled_NV.gather(1, tokens_N[:, None]).squeeze(1) - scaled_NV.logsumexp(1)


def score_tokens(
    logits_NV: Tensor, tokens_N: Tensor, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> TokenScores:
    """The scores of tokens (N,) int64 under logits (N, V).

    This recomputation may put a token just outside of top-k or top-p, after a near tie. Such a token is kept, so that
    its surprisal stays finite.
    """
    scaled_NV = logits_NV.float() / temperature
    logprobs_NV = scaled_NV.log_softmax(1)
    trained_N = logprobs_NV.gather(1, tokens_N[:, None]).squeeze(1)
    sampled_N = trained_N
    probabilities_NV = logprobs_NV.exp()
    if top_k > 0 or top_p < 1.0:
        kept_NV = kept_tokens(scaled_NV, top_p=top_p, top_k=top_k).scatter(1, tokens_N[:, None], True)
        logprobs_NV = scaled_NV.masked_fill(~kept_NV, -math.inf).log_softmax(1)
        sampled_N = logprobs_NV.gather(1, tokens_N[:, None]).squeeze(1)
        probabilities_NV = logprobs_NV.exp()
        logprobs_NV = logprobs_NV.masked_fill(~kept_NV, 0.0)
    # From the mean and the mean square of the log-probabilities: every pass over V costs time in each training step.
    weighted_NV = probabilities_NV * logprobs_NV
    entropy_N = -weighted_NV.sum(1)
    variance_N = torch.einsum("nv,nv->n", weighted_NV, logprobs_NV) - entropy_N.square()
    return TokenScores(trained_N, sampled_N, entropy_N, variance_N.clamp(min=0.0))


def kept_tokens(scaled_NV: Tensor, *, top_p: float, top_k: int, device: str | None = None) -> Tensor:
    """The tokens that top-k and then top-p keep: bool (N, V).

    They are those of vLLM's operator on `device` ("cpu" or "cuda"; None for the tensor's own), which is
    `apply_top_k_top_p_pytorch` or `apply_top_k_top_p_triton`. The first keeps every token that ties with the last of
    the top k. The second keeps k tokens, and of those that tie the first. Logits in bfloat16 tie often.
    """
    if top_k > 0 and (device or scaled_NV.device.type) == "cuda":
        scaled_NV = scaled_NV.masked_fill(_surplus_ties(scaled_NV, top_k), -math.inf)
    ascending_NV, order_NV = scaled_NV.sort(1)
    if top_k > 0:
        kth_N1 = ascending_NV[:, -min(top_k, ascending_NV.shape[1]), None]
        ascending_NV = ascending_NV.masked_fill(ascending_NV < kth_N1, -math.inf)
    kept_NV = ascending_NV > -math.inf
    kept_NV &= ascending_NV.softmax(1).cumsum(1) > 1.0 - top_p
    kept_NV[:, -1] = True
    return torch.zeros_like(kept_NV).scatter(1, order_NV, kept_NV)


def _surplus_ties(scaled_NV: Tensor, top_k: int) -> Tensor:
    """The tokens that tie with the last of the top k, except the first ones that make up k tokens: bool (N, V)."""
    k = min(top_k, scaled_NV.shape[1])
    kth_N1 = scaled_NV.topk(k, 1).values[:, -1:]
    tied_NV = scaled_NV == kth_N1
    room_N1 = k - (scaled_NV > kth_N1).sum(1, keepdim=True)
    return tied_NV & (tied_NV.cumsum(1, dtype=torch.int32) > room_N1)


class SurprisalSums(BaseModel):
    """Sums over tokens for z = sum(surprisal - entropy) / sqrt(sum of the variances of surprisal).

    Under a correct sampler z is close to standard normal: |z| is above 4 about once in 16,000 times.
    """

    tokens: int = 0
    excess: float = 0.0
    variance: float = 0.0

    @classmethod
    def of(cls, scores: TokenScores) -> "SurprisalSums":
        excess = -scores.sampled_logprobs.double() - scores.entropy.double()
        return cls(tokens=len(excess), excess=excess.sum().item(), variance=scores.variance.double().sum().item())

    def __add__(self, other: "SurprisalSums") -> "SurprisalSums":
        return SurprisalSums(
            tokens=self.tokens + other.tokens,
            excess=self.excess + other.excess,
            variance=self.variance + other.variance,
        )

    @property
    def z(self) -> float:
        return self.excess / math.sqrt(self.variance) if self.variance > 0.0 else 0.0

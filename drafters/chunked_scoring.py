"""Scores and log-probabilities of tokens from hidden states, a chunk of logits at a time.

N counts tokens, D is the hidden size, V the vocabulary. A head maps hidden states (N, D) to logits (N, V) in float32 or
bfloat16. Its matrix product gives up to CHUNK logits. What follows makes several copies of its input, so it takes a
small piece of the chunk at a time. Beside hidden states and weights, the peak is therefore below 1.5 chunks of logits,
in the forward and in the backward pass, whatever N is.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from drafters.scoring import TokenScores, join_scores, score_tokens, token_logprobs

CHUNK = 1 << 26
"""most logits in memory at a time (256 MiB in float32). With fewer, a GPU would spend its time on reading the head's
weights and adding to their gradient, once for each chunk"""
PIECES = 32
"""parts of a chunk: with top-k and top-p, `score_tokens` holds about ten copies of its part"""


class Head(Protocol):
    @property
    def vocab_size(self) -> int: ...

    def __call__(self, hidden_ND: Tensor, /) -> Tensor:
        """The logits (N, V), as a tensor that the caller may overwrite."""
        ...


@torch.no_grad()
def score_hidden(
    head: Head, hidden_ND: Tensor, tokens_N: Tensor, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> TokenScores:
    """`score_tokens` under the head's logits."""

    def of_chunk(hidden_ND: Tensor, tokens_N: Tensor) -> TokenScores:
        return score_logits(head(hidden_ND), tokens_N, temperature=temperature, top_p=top_p, top_k=top_k)

    rows = _rows(head)
    return join_scores(map(of_chunk, hidden_ND.split(rows), tokens_N.split(rows)))


def score_logits(
    logits_NV: Tensor, tokens_N: Tensor, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> TokenScores:
    """`score_tokens`, a piece at a time."""
    cut: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    return join_scores(
        score_tokens(piece_NV, of_piece_N, **cut) for piece_NV, of_piece_N in _pieces(logits_NV, tokens_N)
    )


def hidden_logprobs(head: Head, hidden_ND: Tensor, tokens_N: Tensor, temperature: float) -> Tensor:
    """`token_logprobs` under the head's logits, float32 (N,), with gradient."""
    # So few logits are computed once: `token_logprobs` and its backward pass hold about five copies of them.
    if len(hidden_ND) * head.vocab_size <= CHUNK // 4:
        return token_logprobs(head(hidden_ND), tokens_N, temperature)
    return _HiddenLogprobs.apply(head, hidden_ND, tokens_N, temperature)


class _HiddenLogprobs(torch.autograd.Function):
    """Keeps only the hidden states, and computes each chunk's logits again in the backward pass.

    The gradient of log softmax(logits / T)[token] is (onehot(token) - softmax(logits / T)) / T. It is written over the
    logits. The head's own backward pass then adds to the gradients of its weights.
    """

    @staticmethod
    def forward(ctx: Any, head: Head, hidden_ND: Tensor, tokens_N: Tensor, temperature: float) -> Tensor:
        ctx.head, ctx.temperature = head, temperature
        ctx.save_for_backward(hidden_ND, tokens_N)

        def of_chunk(hidden_ND: Tensor, tokens_N: Tensor) -> Tensor:
            parts = _pieces(head(hidden_ND), tokens_N)
            return torch.cat([token_logprobs(piece_NV, of_piece_N, temperature) for piece_NV, of_piece_N in parts])

        rows = _rows(head)
        return torch.cat([*map(of_chunk, hidden_ND.split(rows), tokens_N.split(rows))])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[None, Tensor, None, None]:
        hidden_ND, tokens_N = ctx.saved_tensors

        def of_chunk(hidden_ND: Tensor, tokens_N: Tensor, gradient_N: Tensor) -> Tensor:
            hidden_ND = hidden_ND.detach().requires_grad_()
            with torch.enable_grad():
                logits_NV = ctx.head(hidden_ND)
            gradient_NV = logits_NV.detach()
            for piece_NV, of_piece_N, factor_N in _pieces(gradient_NV, tokens_N, gradient_N / -ctx.temperature):
                probabilities_NV = (piece_NV.float() / ctx.temperature).softmax(1)
                probabilities_NV[torch.arange(len(of_piece_N), device=of_piece_N.device), of_piece_N] -= 1.0
                piece_NV.copy_(probabilities_NV * factor_N[:, None])
            logits_NV.backward(gradient_NV)
            assert hidden_ND.grad is not None
            return hidden_ND.grad

        rows = _rows(ctx.head)
        return (
            None,
            torch.cat([*map(of_chunk, *(t.split(rows) for t in (hidden_ND, tokens_N, gradient_N)))]),
            None,
            None,
        )


def logits_bytes(tokens: int, vocab_size: int) -> int:
    """The most bytes that logits take while so many tokens are scored and trained on."""
    return min(6 * tokens * vocab_size, 3 * CHUNK // 2) * torch.float32.itemsize


def _rows(head: Head) -> int:
    return max(1, CHUNK // head.vocab_size)


def _pieces(logits_NV: Tensor, *of_rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    rows = max(1, CHUNK // PIECES // logits_NV.shape[1])
    return zip(logits_NV.split(rows), *(values.split(rows) for values in of_rows), strict=True)

"""Self-test of sampling and verification: an engine draws some tokens and compares them with their law, when it starts
and for `rollout-service selftest`.

The tokens are drawn by vLLM's own functions of the engine's device, or by what replaces them (`Face`).

- Sampled tokens follow softmax(logits / temperature), cut by top-k and top-p.
- The i-th token that a verification yields follows the target's i-th distribution, if it comes that far.
- Drafts are accepted as often as drafters/verification.py says.

V vocabulary, N rows, R requests, k drafts of each, K = k + 1 positions.
"""

import torch
from torch import Tensor

from drafters.scoring import kept_tokens
from drafters.verification import Drafts, Verification, survival
from rollout_service.vllm_plugin.face import Cut, Face

VOCABULARY, ROWS, REQUESTS, DRAFT_TOKENS = 12, 16384, 16384, 2
CUTS = Cut(1.0), Cut(0.6), Cut(1.0, top_k=5), Cut(1.0, top_p=0.8), Cut(0.8, top_k=8, top_p=0.9)
TEMPERATURE = 0.8
LIMIT = 5.0
"""standard deviations, which a test of right functions exceeds once in some two million. All draws are seeded, so that
engines of one device and version pass always or never"""


def check_law(face: Face) -> None:
    """Raises RuntimeError, with what deviates and by how much."""
    found = deviations(face)
    face.check_products()
    if wrong := {name: by for name, by in found.items() if not by < LIMIT}:
        said = ", ".join(f"{name} by {by:.1f}" for name, by in wrong.items())
        raise RuntimeError(f"vLLM's functions on this device deviate from their law, in standard deviations: {said}")


def deviations(face: Face, scale: int = 1) -> dict[str, float]:
    """The standard deviations by which each function differs from its law. `scale`: times as many tokens are drawn."""
    with torch.random.fork_rng(devices=[]):  # the engine's own samples stay what its seed makes them
        torch.manual_seed(0)
        drafts = min(face.draft_tokens, DRAFT_TOKENS)
        logits_KV = 3.0 * torch.rand(drafts + 1, VOCABULARY)  # no token is too rare for chi-square
        found = {f"sampling at {cut}": sampling_deviation(face, logits_KV[0], cut, scale * ROWS) for cut in CUTS}
        if not bool((face.sample(logits_KV, Cut(0.0)) == logits_KV.argmax(1)).all()):
            found["sampling at temperature 0"] = torch.inf
        if face.draft_tokens:
            draft_KV = logits_KV[:-1] + torch.randn(drafts, VOCABULARY)
            for verification in face.verifications:
                for kind, of_drafts in (("sampled", draft_KV), ("deterministic", None)):
                    by = verification_deviation(face, logits_KV, draft_KV, of_drafts, verification, scale * REQUESTS)
                    found[f"{verification} verification of {kind} drafts"] = by
    return found


def sampling_deviation(face: Face, logits_V: Tensor, cut: Cut, rows: int) -> float:
    """Standard deviations by which so many samples of the same logits differ from their distribution."""
    tokens_N = face.sample(logits_V.repeat(rows, 1), cut)
    scaled_1V = logits_V[None].double() / cut.temperature
    kept_1V = kept_tokens(scaled_1V, top_p=cut.top_p, top_k=cut.top_k, device=face.device_type)
    return deviation(tokens_N, scaled_1V.masked_fill(~kept_1V, -torch.inf).softmax(1)[0])


def verification_deviation(
    face: Face,
    logits_KV: Tensor,
    draft_KV: Tensor,
    of_drafts: Tensor | None,
    verification: Verification,
    requests: int,
) -> float:
    """The largest deviation of the tokens at each position, and of the number of drafts that are accepted.

    Drafts are drawn from `draft_KV`; the verification knows their distribution as `of_drafts`, if they are sampled.
    """
    drafter_KV = (draft_KV / TEMPERATURE).softmax(1)
    drafts_RK = torch.multinomial(drafter_KV, requests, replacement=True).T.contiguous()
    tokens_RK = face.verify(logits_KV.repeat(requests, 1, 1), of_drafts, drafts_RK, TEMPERATURE, verification)
    target_KV = (logits_KV / TEMPERATURE).double().softmax(1)
    of_tokens = [
        deviation(tokens_R[tokens_R >= 0], target_V) for tokens_R, target_V in zip(tokens_RK.T, target_KV, strict=True)
    ]
    drafts = Drafts(
        drafts_RK.flatten(),
        torch.full((requests,), len(draft_KV)),
        None if of_drafts is None else drafter_KV.double().repeat(requests, 1),
    )
    survival_RK, _ = survival(target_KV[:-1].repeat(requests, 1), drafts, verification)
    accepted = (tokens_RK >= 0).sum().item() - requests
    mean_R = survival_RK.sum(1)
    second_R = (survival_RK * torch.arange(1, 2 * len(draft_KV), 2)).sum(1)  # E[n^2]: sum of (2 i - 1) P(n >= i)
    spread = (second_R - mean_R.square()).sum().sqrt()
    return max(*of_tokens, abs(accepted - mean_R.sum().item()) / spread.item())


def deviation(tokens_N: Tensor, expected_V: Tensor) -> float:
    """The standard deviations of a normal distribution by which chi-square of the tokens' counts is too large (Wilson
    and Hilferty, 1931: its cube root is nearly normal). Infinite if a token is drawn that has no probability."""
    counts_V = torch.bincount(tokens_N, minlength=len(expected_V)).double()
    possible_V = expected_V > 0.0
    if bool(counts_V[~possible_V].any()) or len(counts_V) > len(expected_V):
        return torch.inf
    expected_V = expected_V[possible_V] * len(tokens_N)
    freedom = len(expected_V) - 1
    chi2 = ((counts_V[possible_V] - expected_V).square() / expected_V).sum().item()
    variance = 2.0 / (9.0 * freedom)
    return ((chi2 / freedom) ** (1.0 / 3.0) - (1.0 - variance)) / variance**0.5

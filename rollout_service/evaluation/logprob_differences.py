"""Differences between returned and recomputed log-probabilities, and what explains them: the edge of a cut, or ties."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from drafters.scoring import TokenScores, join_scores
from rollout_service.evaluation.cut import Cut
from rollout_service.evaluation.exact_policy import Recomputation, Response
from rollout_service.evaluation.router_ties import Flips, RouterTies, count_flips, count_ties, find_flips, tied_before

ON_THE_EDGE = 1e-5
"""distance from the edge of top-k (in nats) or top-p (in probability) within which rounding may decide what is cut"""


class Differences(NamedTuple):
    of_tokens: Tensor
    """|returned - recomputed| of each token, or 0 if it is explained"""
    scores: TokenScores
    """of each token, by the experts that the engine chose"""
    on_the_edge: int
    """tokens that rounding at the edge of the cut explains"""
    ties: RouterTies | None
    """None for a policy whose routers leave no expert out"""
    flips: dict[int, Flips]
    """the engine's other choices of experts, by the response's index, where they explain its log-probabilities"""


def logprob_differences(
    responses: Sequence[Response], recomputed: Sequence[TokenScores], margins: Sequence[Tensor], returned: Tensor,
    recomputation: Recomputation, cut: Cut, tolerance: float, least_p: float,
) -> Differences:  # fmt: skip
    """`recomputed`, `margins` are those of `Recomputation.scores_and_margins`, one for each response. Ties explain
    nothing if `margins` is empty, or if so many ties have a probability below `least_p`."""
    lengths = [len(response.tokens) for response in responses]
    scores = list(recomputed)
    differences = (join_scores(scores).sampled_logprobs - returned).abs()
    edge = on_the_edge(responses, differences, recomputation, cut, tolerance)
    differences = differences.masked_fill(edge, 0.0)
    if not margins:
        return Differences(differences, join_scores(scores), int(edge.sum()), None, {})
    ties = count_ties(responses, margins)
    flips: dict[int, Flips] = {}
    excused = torch.zeros_like(edge)
    wrong_of = [part > tolerance for part in differences.split(lengths)]
    for index, wrong_N in enumerate(wrong_of if ties.p >= least_p else []):
        if not wrong_N.any():
            continue
        response, returned_N = responses[index], returned.split(lengths)[index]
        first = int(wrong_N.nonzero()[0])
        if not tied_before(response, margins[index], first):
            break  # the row fails, so what else may be explained is of no use
        found = find_flips(response, returned_N, recomputation, cut, tolerance)
        if not found:
            break
        flips[index], scores[index] = found
        excused.split(lengths)[index].copy_(wrong_N)
    ties.flips, ties.excused = count_flips(responses, flips), int(excused.sum())
    ties.largest_excused = (differences * excused).max().item()
    return Differences(differences.masked_fill(excused, 0.0), join_scores(scores), int(edge.sum()), ties, flips)


def on_the_edge(
    responses: Sequence[Response], differences: Tensor, recomputation: Recomputation, cut: Cut, tolerance: float
) -> Tensor:
    """The tokens whose difference is above the tolerance because rounding decides whether a token is within top-k or
    top-p: bool (N,)."""
    if cut.temperature == 0.0 or (cut.top_k == 0 and cut.top_p == 1.0):
        return torch.zeros(len(differences), dtype=torch.bool)
    lengths = [len(response.tokens) for response in responses]
    wrong = [i for i, part in enumerate(differences.split(lengths)) if part.max() > tolerance]
    gaps = [torch.full((length,), math.inf) for length in lengths]
    for index, gap in zip(wrong, recomputation.edge_gaps([responses[i] for i in wrong], cut), strict=True):
        gaps[index] = gap
    return (torch.cat(gaps) < ON_THE_EDGE) & (differences > tolerance)

"""Differences between returned and recomputed log-probabilities, and what explains them: the edge of a cut, or ties.

Both sides round. Where a difference is above the tolerance, the response is recomputed in float64, so that only the
engine's rounding is left.
"""

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


FEW = 16
"""responses that are recomputed in float64. More than these are wrong for another reason than rounding"""


class Differences(NamedTuple):
    of_tokens: Tensor
    """|returned - recomputed| of each token, or 0 if it is explained"""
    scores: TokenScores
    """of each token, by the experts that the engine chose"""
    on_the_edge: int
    """tokens that rounding at the edge of the cut explains"""
    in_float64: int
    """tokens above the tolerance in float32, whose responses were recomputed in float64"""
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
    scores, margins = list(recomputed), list(margins)
    differences = (join_scores(scores).sampled_logprobs - returned).abs()
    edge = on_the_edge(responses, differences, recomputation, cut, tolerance)
    differences = differences.masked_fill(edge, 0.0)
    ties = count_ties(responses, margins) if margins else None
    wrong, in_float64 = wrong_responses(differences, lengths, tolerance), 0
    if 0 < len(wrong) <= FEW and recomputation.dtype == torch.float32:
        in_float64 = int((differences > tolerance).sum())
        recomputation = recomputation.in_float64()
        for index in wrong:
            scores[index : index + 1] = recomputation.scores([responses[index]], cut)
            if margins:
                margins[index : index + 1] = recomputation.scores_and_margins([responses[index]], cut)[1]
        differences = (join_scores(scores).sampled_logprobs - returned).abs().masked_fill(edge, 0.0)
    if ties is None:
        return Differences(differences, join_scores(scores), int(edge.sum()), in_float64, None, {})
    flips: dict[int, Flips] = {}
    excused = torch.zeros_like(edge)
    for index in wrong_responses(differences, lengths, tolerance) if ties.p >= least_p else []:
        response, returned_N = responses[index], returned.split(lengths)[index]
        wrong_N = differences.split(lengths)[index] > tolerance
        if not tied_before(response, margins[index], int(wrong_N.nonzero()[0])):
            break  # the row fails, so what else may be explained is of no use
        found = find_flips(response, returned_N, recomputation, cut, tolerance)
        if not found:
            break
        flips[index], scores[index] = found
        excused.split(lengths)[index].copy_(wrong_N)
    ties.flips, ties.excused = count_flips(responses, flips), int(excused.sum())
    ties.largest_excused = (differences * excused).max().item()
    differences = differences.masked_fill(excused, 0.0)
    return Differences(differences, join_scores(scores), int(edge.sum()), in_float64, ties, flips)


def wrong_responses(differences: Tensor, lengths: Sequence[int], tolerance: float) -> list[int]:
    return [index for index, part in enumerate(differences.split(lengths)) if (part > tolerance).any()]


def on_the_edge(
    responses: Sequence[Response], differences: Tensor, recomputation: Recomputation, cut: Cut, tolerance: float
) -> Tensor:
    """The tokens whose difference is above the tolerance because rounding decides whether a token is within top-k or
    top-p: bool (N,)."""
    if cut.temperature == 0.0 or (cut.top_k == 0 and cut.top_p == 1.0):
        return torch.zeros(len(differences), dtype=torch.bool)
    lengths = [len(response.tokens) for response in responses]
    wrong = wrong_responses(differences, lengths, tolerance)
    gaps = [torch.full((length,), math.inf) for length in lengths]
    for index, gap in zip(wrong, recomputation.edge_gaps([responses[i] for i in wrong], cut), strict=True):
        gaps[index] = gap
    return (torch.cat(gaps) < ON_THE_EDGE) & (differences > tolerance)

"""A row of the audit: the tests of one setting's samples, and the verdict.

The step's record says where a token stands in its draft. Position i is the i-th token of a step that drafted at least i
tokens, whether that token was accepted or replaced a refused one. Given that the step came that far, it follows the
target's distribution. (Accepted tokens alone do not follow it, and replacements alone do not: only both together.)
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor

from drafters.scoring import SurprisalSums, TokenScores, kept_tokens
from rollout_service.evaluation.audit_config import Setting
from rollout_service.evaluation.cut import Cut
from rollout_service.evaluation.exact_policy import Recomputation, Response
from rollout_service.evaluation.goodness_of_fit import EXPECTED, Fit, detectable_shift, g_test, holm, p_of_z
from rollout_service.evaluation.logprob_differences import logprob_differences
from rollout_service.evaluation.ran import Ran
from rollout_service.evaluation.router_margins import recorded_margins
from rollout_service.evaluation.router_ties import Flips, RouterTies, first_flip, tied_before
from rollout_service.protocol import Completion, Group

NEAR_TIE = 1e-3
"""nats between the best two tokens, within which the engine and the recomputation may differ at temperature 0"""


class Score(BaseModel):
    tokens: int
    z: float


class PairFit(BaseModel):
    """The first two tokens after each context, tested against exact probabilities."""

    p_first: float
    """p-value of the first tokens, over all contexts together"""
    p_both: float
    """p-value of the pairs, over all contexts together"""
    p_worst_context: float
    """the smallest p-value of a single context, corrected for the number of contexts"""
    draws: int


class Greedy(BaseModel):
    """At temperature 0: responses compared with those of the engine without a drafter, or with a recomputation."""

    compared: int
    identical: int
    explained: int
    """responses whose first difference is where the best two tokens are nearly equal"""
    after_router_ties: int = 0
    """responses whose first difference comes after a tie of the policy's routers, and which took the most likely tokens
    all the same"""

    @property
    def right(self) -> int:
        return self.identical + self.explained + self.after_router_ties


class Detectable(BaseModel):
    """The smallest bias that this many tokens would have shown four times in five."""

    nats_per_token: float
    """shift of the mean surprisal"""
    temperature: float
    """relative error of the temperature"""
    total_variation: float
    """total variation of the first token's distribution, whatever form the bias has"""


class AuditRow(BaseModel):
    drafter: str
    model: str
    """folder or Hugging Face name of the drafter's checkpoint; empty if it has none of its own"""
    draft_tokens: int
    draft_sampling: str
    verification: str
    """what ran: standard or block, and whose function it was"""
    temperature: float
    top_p: float
    top_k: int
    tokens: int
    z: float | None
    """None at temperature 0, where nothing is random"""
    positions: dict[str, Score]
    """z by position: draft 1 to draft k, bonus, undrafted; and for responses that end at the context limit"""
    fit: PairFit | None
    logprob_difference_max: float
    logprob_difference_mean: float
    logprobs_on_the_edge: int
    """tokens whose difference counts as 0, because rounding decides whether a token is within top-k or top-p"""
    logprobs_in_float64: int
    """tokens whose difference was above the tolerance, and whose response was recomputed in float64"""
    router_ties: RouterTies | None
    """of a policy whose routers leave experts out, in float32"""
    untested: list[str]
    """what cannot be compared in 16 bits, because routers choose otherwise at many tokens"""
    greedy: Greedy | None
    detectable: Detectable | None
    acceptance_length: float
    failures: list[str]
    """what is wrong; a row without failures has passed"""


@dataclass(frozen=True)
class Level:
    """The limits that a row must keep."""

    limit: float = 4.0
    logprob_tolerance: float = 1e-4
    in_float32: bool = True
    """whether engine and recomputation compute in float32. Where they do not, log-probabilities of single tokens of a
    routed policy are not comparable"""

    @property
    def p(self) -> float:
        return p_of_z(self.limit)


def judge(
    setting: Setting, groups: Sequence[Group], recomputation: Recomputation, level: Level, context_limit: int,
    greedy: dict[tuple[int, ...], list[int]] | None = None, ran: Ran | None = None,
) -> AuditRow:  # fmt: skip
    """`greedy`: at temperature 0, what the engine without a drafter generates for each prompt. `ran`: how the engine
    sampled and verified drafts, if that is known."""
    cut = setting.cut
    completions = [(group.prompt_token_ids, c) for group in groups for c in group.completions]
    responses = [Response(prompt, c.token_ids) for prompt, c in completions]
    comparable = level.in_float32 or not recomputation.routers
    tolerance = level.logprob_tolerance if comparable else math.inf
    margins: list[Tensor] = []
    if recomputation.routers and comparable:
        recomputed, margins = recomputation.scores_and_margins(responses, cut)
    else:
        recomputed = recomputation.scores(responses, cut)
    returned = torch.tensor([logprob for _, c in completions for logprob in c.logprobs])
    differences = logprob_differences(responses, recomputed, margins, returned, recomputation, cut, tolerance, level.p)
    ties = differences.ties
    too_many_ties = ties is not None and ties.p < level.p
    row = AuditRow(
        **(ran or Ran(setting.drafter.draft_sampling, setting.drafter.verification))._asdict(),
        **cut._asdict(),
        drafter=setting.drafter.kind,
        model=setting.drafter.model or "",
        draft_tokens=setting.drafter.draft_tokens,
        tokens=len(returned),
        z=None,
        positions={},
        fit=None,
        logprob_difference_max=differences.of_tokens.max().item(),
        logprob_difference_mean=differences.of_tokens.mean().item(),
        logprobs_on_the_edge=differences.on_the_edge,
        logprobs_in_float64=differences.in_float64,
        router_ties=ties,
        untested=[] if comparable else ["log-probabilities"],
        greedy=None,
        detectable=None,
        acceptance_length=acceptance_length([c for _, c in completions]),
        failures=[],
    )
    if row.logprob_difference_max > tolerance or not math.isfinite(row.logprob_difference_max):
        row.failures.append("log-probabilities")
    if cut.temperature == 0.0:
        of_ties = () if too_many_ties else margins
        row.greedy = compare_greedy(responses, greedy, recomputation, of_ties, differences.flips)
        if not comparable:
            row.untested.append("greedy decoding")
        elif row.greedy.right < row.greedy.compared:
            row.failures.append("differs from greedy decoding")
    if row.failures and too_many_ties:
        row.failures.append("too many router ties")
    if cut.temperature == 0.0:
        return row
    scores = differences.scores
    sums = SurprisalSums.of(scores)
    row.z = sums.z
    if abs(row.z) >= level.limit:
        row.failures.append("surprisal")
    at_limit = [sum(map(len, response)) == context_limit for response in responses]
    row.positions = by_position([c for _, c in completions], at_limit, scores)
    if holm([p_of_z(score.z) for score in row.positions.values()]) < level.p:
        worst = max(row.positions, key=lambda name: abs(row.positions[name].z))
        row.failures.append(f"surprisal at {worst}")
    row.fit, first = fit_first_two(responses, recomputation, cut, differences.flips)
    if min(row.fit.p_first, row.fit.p_both, row.fit.p_worst_context) < level.p:
        row.failures.append("first two tokens")
    deviation = math.sqrt(sums.variance)
    row.detectable = Detectable(
        nats_per_token=detectable_shift(deviation, level.limit) / sums.tokens,
        temperature=detectable_shift(1.0, level.limit) / deviation if deviation else math.inf,
        total_variation=first.detectable_variation(level.p),
    )
    return row


def acceptance_length(completions: Sequence[Completion]) -> float:
    records = [c.speculation for c in completions if c.speculation]
    steps = sum(record.draft_steps for record in records)
    return 1.0 + sum(record.accepted for record in records) / steps if steps else 1.0


def token_positions(completion: Completion) -> list[str]:
    """Where each token stands in its step: "draft i", "bonus" (after a draft that was accepted whole), "undrafted".

    Example: steps [(0, 0), (3, 1), (3, 3)] give undrafted; draft 1, draft 2; draft 1, draft 2, draft 3, bonus.
    """
    steps = completion.speculation.steps if completion.speculation else None
    if steps is None:
        return ["undrafted"] * len(completion.token_ids)
    names = []
    for drafted, accepted in steps:
        names += [f"draft {i + 1}" for i in range(accepted)]
        names.append("undrafted" if drafted == 0 else "bonus" if accepted == drafted else f"draft {accepted + 1}")
    return names[: len(completion.token_ids)]


def by_position(completions: Sequence[Completion], at_limit: Sequence[bool], scores: TokenScores) -> dict[str, Score]:
    """`scores` are those of the completions' tokens. `at_limit` says which completions end at the context limit."""
    lengths = [len(completion.token_ids) for completion in completions]
    names_N = np.array([name for completion in completions for name in token_positions(completion)])
    chosen = {str(name): names_N == name for name in np.unique(names_N)}
    if any(at_limit):
        chosen["context limit"] = np.repeat(np.array(at_limit), lengths)
    sums = {name: SurprisalSums.of(scores.where(torch.from_numpy(of))) for name, of in chosen.items()}
    return {name: Score(tokens=of.tokens, z=of.z) for name, of in sums.items()}


def fit_first_two(
    responses: Sequence[Response], recomputation: Recomputation, cut: Cut, flips: Mapping[int, Flips] | None = None
) -> tuple[PairFit, Fit]:
    """The p-values of the first two tokens, and the fit of the first tokens alone, over all contexts. A context is left
    out if the engine chose other experts there, by `flips` of the response's index: its responses then follow two
    distributions."""
    first, both = Fit(), Fit()
    single: list[float] = []
    by_prompt: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    flipped = [responses[i] for i, of in (flips or {}).items() if first_flip(of) <= len(responses[i].prompt)]
    left_out = {tuple(response.prompt) for response in flipped}
    for response in responses:
        by_prompt.setdefault(tuple(response.prompt), []).append((response.tokens[0], response.tokens[1]))
    prompts = [prompt for prompt in by_prompt if prompt not in left_out]
    logits_CV = recomputation.next_logits([list(prompt) for prompt in prompts]) if prompts else torch.zeros(0, 1)
    first_CV = distribution(logits_CV, cut)
    for prompt, of_first in zip(prompts, first_CV, strict=True):
        pairs = by_prompt[prompt]
        counts = np.bincount([a for a, _ in pairs], minlength=len(of_first))
        of_context = g_test(counts, of_first.numpy())
        # Pairs that begin with a rare token are rare themselves, so they are counted together.
        begins = (of_first * len(pairs) >= EXPECTED).nonzero().flatten().tolist()
        after = [[*prompt, token] for token in begins]
        second_BV = distribution(recomputation.next_logits(after), cut) if after else torch.zeros(0, len(of_first))
        chances = (of_first[begins, None] * second_BV).flatten().numpy()
        seen = Counter(pairs)
        counted = np.array([seen[begin, b] for begin in begins for b in range(len(of_first))])
        of_pairs = g_test(
            np.append(counted, len(pairs) - counted.sum()), np.append(chances, max(0.0, 1.0 - chances.sum()))
        )
        single += [of_context.p, of_pairs.p]
        first, both = first.plus(of_context), both.plus(of_pairs)
    return PairFit(p_first=first.p, p_both=both.p, p_worst_context=holm(single), draws=first.draws), first


def distribution(logits_NV: Tensor, cut: Cut) -> Tensor:
    """The distribution that is sampled from, float64 (N, V)."""
    scaled_NV = logits_NV.double() / cut.temperature
    kept_NV = kept_tokens(scaled_NV, top_p=cut.top_p, top_k=cut.top_k)
    return scaled_NV.masked_fill(~kept_NV, -math.inf).softmax(1)


def compare_greedy(
    responses: Sequence[Response], expected: dict[tuple[int, ...], list[int]] | None, recomputation: Recomputation,
    margins: Sequence[Tensor] = (), flips: Mapping[int, Flips] | None = None,
) -> Greedy:  # fmt: skip
    """Compare with `expected`, or if that is None with the recomputation, whose most likely token each must be.
    `margins`, `flips`: of each response's routers, and where the engine chose otherwise (logprob_differences.py)."""
    indices: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for index, response in enumerate(responses):
        indices.setdefault((tuple(response.prompt), tuple(response.tokens)), []).append(index)
    firsts = [of_same[0] for of_same in indices.values()]
    best = recomputation.runner_up_margins([responses[index] for index in firsts])
    result = Greedy(compared=len(responses), identical=0, explained=0)
    for index, best_N, of_same in zip(firsts, best, indices.values(), strict=True):
        response, times = responses[index], len(of_same)
        if expected is None:
            differs = (best_N < 0.0).nonzero().flatten().tolist()
        else:
            wanted = expected[tuple(response.prompt)]
            differs = [i for i, (a, b) in enumerate(zip(response.tokens, wanted, strict=True)) if a != b]
        if not differs:
            result.identical += times
        elif abs(best_N[differs[0]].item()) < NEAR_TIE:
            result.explained += times
        elif margins and tied_before(response, margins[index], differs[0]):
            with recorded_margins(recomputation.routers, (flips or {}).get(index, frozenset())):
                (best_N,) = recomputation.runner_up_margins([response])
            if best_N.min() > -NEAR_TIE:
                result.after_router_ties += times
    return result

"""Prediction of speed relative to no drafter, from the measured costs and the acceptance.

Of each number of streams: each generates some responses of one length, one after the other, and all begin at once.
Without drafts they go on in step. With drafts a response takes a random number of steps, so that streams drift apart,
prompts come one by one between other streams' steps, and the batch is not full at the end.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from scipy.stats import binom

from drafters.schedule import StepCosts

GAP = 2
"""steps that a stream has no part in between two responses: one is under way when its next prompt comes, and the next
one computes the prompt"""


def speedup(
    costs: StepCosts,
    baseline: StepCosts,
    acceptance: Sequence[float],
    drafts: Sequence[int],
    *,
    streams: int,
    each: int,
    tokens: int,
) -> float:
    """Predicted speed of `streams` streams of `each` responses of `tokens` tokens with `drafts[b - 1]` drafts at batch
    size b, relative to an engine without a drafter (`baseline`, whose only draft length is 0)."""
    without = seconds(baseline, [], [0] * streams, streams=streams, each=each, tokens=tokens)
    return without / seconds(costs, acceptance, drafts, streams=streams, each=each, tokens=tokens)


def seconds(
    costs: StepCosts, acceptance: Sequence[float], drafts: Sequence[int], *, streams: int, each: int, tokens: int
) -> float:
    """Expected, to the end of the last response. All steps yield what those of the full batch do, but cost what the
    batch and the draft length left cost."""
    length = drafts[streams - 1]
    batch = np.arange(streams + 1)
    cost = np.array([0.0] + [costs.at(b, drafts[b - 1]) for b in batch[1:]])
    decode = decoding_at(steps(acceptance[:length], tokens - 1), each)
    """[t]: the probability of each stream to decode in the t-th step: how many do is binomial"""
    decoding = (cost @ binom.pmf(batch[:, None], streams, decode)).sum()
    return float(each * costs.prompts(streams) + decoding)


def steps(acceptance: Sequence[float], tokens: int) -> np.ndarray:
    """[n]: the probability that so many tokens take n steps, with a draft at every position of `acceptance` in each.
    More than tokens / tokens_per_step: what the last step yields beyond the response's length is lost."""
    reached = [1.0, *acceptance, 0.0]
    yields = [now - beyond for now, beyond in pairwise(reached)]
    """[i]: the probability that a step yields i + 1 tokens"""
    ended = [float(tokens == 0)]
    had: np.ndarray = np.ones(1)
    """[m]: the probability of m tokens so far, all of them wanted"""
    for _ in range(tokens):
        has = np.convolve(had, [0.0, *yields])
        ended.append(has[tokens:].sum())
        had = has[:tokens]
    return np.array(ended)


def decoding_at(steps: np.ndarray, each: int) -> np.ndarray:
    """[t]: the probability that a stream decodes in the t-th step of all, with `each` responses that take n steps with
    probability `steps[n]` and GAP between them."""
    gap = np.eye(GAP + 1)[GAP]
    end_of_all = each * (len(steps) + GAP)

    def not_yet(after: np.ndarray) -> np.ndarray:
        """[t]: the probability of more than t steps, `after[n]` being that of n."""
        return 1.0 - np.cumsum(np.pad(after, (0, end_of_all - len(after))))

    decodes, begin = np.zeros(end_of_all), np.ones(1)
    for _ in range(each):
        end = np.convolve(begin, steps)
        decodes += not_yet(end) - not_yet(begin)
        begin = np.convolve(end, gap)
    return np.clip(decodes, 0.0, 1.0)  # rounding

"""Prediction of the speed relative to no drafter, from measured step costs and acceptance.

Some number of streams begin at the same time. Each generates a few responses of one length, one after the other.
Without drafts, all streams stay in step. With drafts, a response takes a random number of steps. So the streams drift
apart, prompts arrive one by one between the steps of other streams, and the batch is not full at the end.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from scipy.stats import binom

from drafters.schedule import StepCosts

GAP = 2
"""steps between two responses of a stream in which it decodes nothing: one step is running when the next prompt comes,
and one computes the prompt"""


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
    """Predicted speed relative to an engine without a drafter.

    Each of `streams` streams generates `each` responses of `tokens` tokens, with `drafts[b - 1]` draft tokens at batch
    size b. `baseline` are the costs of the engine without a drafter; its only draft length is 0.
    """
    without = seconds(baseline, [], [0] * streams, streams=streams, each=each, tokens=tokens)
    return without / seconds(costs, acceptance, drafts, streams=streams, each=each, tokens=tokens)


def seconds(
    costs: StepCosts, acceptance: Sequence[float], drafts: Sequence[int], *, streams: int, each: int, tokens: int
) -> float:
    """Expected seconds until the last response ends.

    Every step yields the tokens of a step with the full batch, but costs what the remaining batch and its draft length
    cost.
    """
    length = drafts[streams - 1]
    batch = np.arange(streams + 1)
    cost = np.array([0.0] + [costs.at(b, drafts[b - 1]) for b in batch[1:]])
    decode = decoding_at(steps(acceptance[:length], tokens - 1), each)
    """[t]: the probability that a stream decodes in the t-th step; the number of streams that do is binomial"""
    decoding = (cost @ binom.pmf(batch[:, None], streams, decode)).sum()
    return float(each * costs.prompts(streams) + decoding)


def steps(acceptance: Sequence[float], tokens: int) -> np.ndarray:
    """[n]: the probability that `tokens` tokens take n steps, each with a draft of `len(acceptance)` tokens.

    The mean is above tokens / tokens_per_step, because tokens beyond the response's length are lost.
    """
    reached = [1.0, *acceptance, 0.0]
    yields = [now - beyond for now, beyond in pairwise(reached)]
    """[i]: the probability that a step yields i + 1 tokens"""
    ended = [float(tokens == 0)]
    had: np.ndarray = np.ones(1)
    """[m]: the probability that the response has m tokens so far and is not complete"""
    for _ in range(tokens):
        has = np.convolve(had, [0.0, *yields])
        ended.append(has[tokens:].sum())
        had = has[:tokens]
    return np.array(ended)


def decoding_at(steps: np.ndarray, each: int) -> np.ndarray:
    """[t]: the probability that a stream decodes in the t-th step overall.

    The stream has `each` responses, with GAP steps between them. A response takes n steps with probability `steps[n]`.
    """
    gap = np.eye(GAP + 1)[GAP]
    end_of_all = each * (len(steps) + GAP)

    def not_yet(after: np.ndarray) -> np.ndarray:
        """[t]: the probability of more than t steps, where `after[n]` is the probability of n."""
        return 1.0 - np.cumsum(np.pad(after, (0, end_of_all - len(after))))

    decodes, begin = np.zeros(end_of_all), np.ones(1)
    for _ in range(each):
        end = np.convolve(begin, steps)
        decodes += not_yet(end) - not_yet(begin)
        begin = np.convolve(end, gap)
    return np.clip(decodes, 0.0, 1.0)  # rounding

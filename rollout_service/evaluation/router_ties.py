"""Ties of a policy's routers: the differences of log-probabilities that they excuse, and how many ties to expect.

Where the last chosen expert and the best one left out are nearly equal, an engine may rightly choose the other. All
log-probabilities from there on then jump. The rule, for float32:

- A difference is excused only if a margin below TIE stands in its sequence, at the position that predicts the token or
  before it.
- The other choice must explain it: a recomputation that chooses as the engine is supposed to have chosen must agree
  with every token of the response. So a wrong log-probability after a tie is still wrong.
- There may be no more ties than the density of margins near 0 predicts. Two equal experts, for instance, tie at every
  token, so nothing is excused then.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from pydantic import BaseModel
from scipy.stats import binom
from torch import Tensor

from drafters.scoring import TokenScores
from rollout_service.evaluation.cut import Cut
from rollout_service.evaluation.exact_policy import Recomputation, Response
from rollout_service.evaluation.router_margins import Flip

TIE = 1e-5
"""margin below which rounding in float32 may decide which expert is chosen"""
NEAR = 1e-3
"""margins below it tell the density of margins near 0, which is nearly constant on this scale"""
FORWARDS = 32
"""forward passes in which the flips of one response must be found"""

Flips = frozenset[Flip]


class RouterTies(BaseModel):
    """The ties of a row's sequences, and what they excuse. Where sequences begin with the same tokens, routers see the
    same, so a position is counted once for each different beginning."""

    positions: int
    near: int
    """positions with a margin below 1e-3 in some layer"""
    ties: int
    """positions with a margin below 1e-5 in some layer"""
    ties_expected: float
    """a hundredth of `near`. An engine flips at ties only, so at most as many flips are expected"""
    p: float
    """probability of at least this many ties among the near positions"""
    tokens_in_reach: int
    """response tokens at a tie or after one"""
    tokens_in_reach_expected: float
    flips: int = 0
    """choices at which the engine took the other expert, each confirmed by a recomputation"""
    excused: int = 0
    """tokens whose difference counts as 0, because flips explain it"""
    largest_excused: float = 0.0
    """the largest of these differences, in nats"""


def predicting(response: Response, token: int) -> int:
    """How many positions predict the first `token` + 1 tokens of the response."""
    return len(response.prompt) + token


def tied_before(response: Response, margins_T: Tensor, token: int) -> bool:
    """Whether a tie stands at the position that predicts the response's token, or before it."""
    return bool((margins_T[: predicting(response, token)] < TIE).any())


def first_flip(flips: Flips) -> int:
    """The token of the sequence at which the engine first chose otherwise."""
    return min(token for _, token in flips)


def find_flips(
    response: Response, returned_N: Tensor, recomputation: Recomputation, cut: Cut, tolerance: float
) -> tuple[Flips, TokenScores] | None:
    """The flips with which the recomputation agrees with every returned log-probability, few before many, and its
    scores; None if there are no such flips. Each is at a tie before the first token that is wrong without it."""
    queue: deque[tuple[Flip, ...]] = deque([()])
    for _ in range(FORWARDS):
        if not queue:
            return None
        flips = queue.popleft()
        scores, margins_LT = recomputation.with_flips(response, cut, frozenset(flips))
        wrong = (~((returned_N - scores.sampled_logprobs).abs() <= tolerance)).nonzero().flatten().tolist()
        if not wrong:
            return frozenset(flips), scores
        tied_TL = margins_LT[:, : predicting(response, wrong[0])].T < TIE
        ties: Iterable[Flip] = ((layer, token) for token, layer in reversed(tied_TL.nonzero().tolist()))
        queue += [(*flips, tie) for tie in ties if not flips or after(tie, flips[-1])]
    return None


def after(tie: Flip, other: Flip) -> bool:
    return (tie[1], tie[0]) > (other[1], other[0])


def count_ties(responses: Sequence[Response], margins: Sequence[Tensor]) -> RouterTies:
    """`margins`: those of each response, as `Recomputation.scores_and_margins` gives them. No flips are counted yet."""
    beginnings: dict[tuple[int, int], int] = {}
    near, ties = set[int](), set[int]()
    in_reach, expected = 0, 0.0
    for response, margins_T in zip(responses, margins, strict=True):
        beginning, at = 0, list[int]()
        for token in (*response.prompt, *response.tokens[:-1]):
            beginning = beginnings.setdefault((beginning, token), len(beginnings) + 1)
            at.append(beginning)
        near |= {at[i] for i in (margins_T < NEAR).nonzero().flatten().tolist()}
        ties |= {at[i] for i in (margins_T < TIE).nonzero().flatten().tolist()}
        of_tokens = slice(len(response.prompt) - 1, None)
        in_reach += int(((margins_T < TIE).cumsum(0)[of_tokens] > 0).sum())
        expected += (1.0 - (1.0 - TIE / NEAR) ** (margins_T < NEAR).cumsum(0)[of_tokens]).sum().item()
    return RouterTies(
        positions=len(beginnings),
        near=len(near),
        ties=len(ties),
        ties_expected=len(near) * TIE / NEAR,
        p=float(binom.sf(len(ties) - 1, len(near), TIE / NEAR)),
        tokens_in_reach=in_reach,
        tokens_in_reach_expected=expected,
    )


def count_flips(responses: Sequence[Response], flips: Mapping[int, Flips]) -> int:
    """Different flips: responses that begin with the same tokens share those within. `flips`: by response's index."""
    ids = {index: [*responses[index].prompt, *responses[index].tokens] for index in flips}
    return len({(layer, *ids[index][: token + 1]) for index, of in flips.items() for layer, token in of})

"""RolloutSource: where both loops get their rollouts from, the service or a recording (recording.py).

A batch is the groups of one step or evaluation; its groups' ids are its name and a number: `train-000003-00017`. An
asynchronous run asks here for held-out groups alone: those that it trains on come by the service's queue (pulling.py).
"""

import logging
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from typing import Protocol

from rl_loop.loops.ownership import Ownership
from rl_loop.loops.publishing import Publisher
from rollout_service.client import RolloutError
from rollout_service.protocol import Group, GroupRequest, SpeculationAlarm

logger = logging.getLogger("rl_loop")


class RolloutSource(Protocol):
    @property
    def publisher(self) -> Publisher:
        """Of the weights that sample its groups."""

    def rollouts(self, batch: str, requests: Sequence[GroupRequest]) -> Generator[Group]:
        """The finished groups of a batch, in any order. Closing the generator ends the generation of the rest.

        Raises RolloutError at the end when some failed; `failed` says which.
        """


class EndpointSource:
    """The rollout service, whose weights are the run's own."""

    def __init__(self, publisher: Ownership):
        self.publisher, self.client = publisher, publisher.client

    def rollouts(self, batch: str, requests: Sequence[GroupRequest]) -> Generator[Group]:
        """Raises ForeignWeights for a group that other weights sampled than those published."""
        with closing(self.client.rollouts(requests)) as groups:
            for group in groups:
                self.publisher.check([group])
                yield group

    def context_limit(self) -> int | None:
        """Tokens of prompt and response together; None when the service does not say."""
        return self.client.model().get("max_model_len")

    def alarms(self) -> list[SpeculationAlarm]:
        """What the service has noticed of its drafters."""
        return self.client.speculation().alarms


def delivered(groups: Iterable[Group]) -> Generator[Group]:
    """The groups of a batch, without those that failed, which are told. Raises RolloutError when all failed, or the
    stream did: a step goes on with fewer groups, but not with none."""
    count = 0
    try:
        for group in groups:
            count += 1
            yield group
    except RolloutError as error:
        if not error.failed or count == 0:
            raise
        logger.warning("going on with the other %d groups: %s", count, error)

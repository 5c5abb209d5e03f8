"""RolloutSource: where a loop gets rollouts from, the service or a recording (recording.py).

A batch is the groups of one step or evaluation. Its groups' ids are its name and a number: `train-000003-00017`. An
asynchronous run gets only its held-out groups here. Those that it trains on come from the service's queue (pulling.py).
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
        """The publisher of the weights that sample its groups."""

    def rollouts(self, batch: str, requests: Sequence[GroupRequest]) -> Generator[Group]:
        """The finished groups of a batch, in any order. Closing the generator ends the generation of the rest.

        Raises RolloutError at the end when some groups failed; its `failed` lists them.
        """


class EndpointSource:
    """The rollout service, with weights that the run pushes."""

    def __init__(self, publisher: Ownership):
        self.publisher, self.client = publisher, publisher.client

    def rollouts(self, batch: str, requests: Sequence[GroupRequest]) -> Generator[Group]:
        """Raises ForeignWeights when weights that this run did not push sampled a group."""
        with closing(self.client.rollouts(requests)) as groups:
            for group in groups:
                self.publisher.check([group])
                yield group

    def context_limit(self) -> int | None:
        """The context length, in tokens of prompt and response together; None if the service does not say."""
        return self.client.model().get("max_model_len")

    def alarms(self) -> list[SpeculationAlarm]:
        """The alarms that the service has raised about its drafters."""
        return self.client.speculation().alarms


def delivered(groups: Iterable[Group]) -> Generator[Group]:
    """The groups of a batch without those that failed, which are logged. Raises RolloutError when all groups failed, or
    the stream itself failed: a step goes on with fewer groups, but not with none."""
    count = 0
    try:
        for group in groups:
            count += 1
            yield group
    except RolloutError as error:
        if not error.failed or count == 0:
            raise
        logger.warning("the batch goes on with the other %d groups: %s", count, error)

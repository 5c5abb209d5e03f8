"""Ledger: where each of a run's problems is, and under which lease. Its checkpoints hold all but the leases.

sent --(leased, trained on or spent)--> trained --(a checkpoint holds it; acknowledged)--> forgotten
"""

import logging
import threading
from collections.abc import Iterable

import httpx

from rollout_service.client import RolloutClient, RolloutError

logger = logging.getLogger("rl_loop")


class Ledger:
    """Which of the run's problems are where. Its methods may be called from any thread."""

    def __init__(self, position: int, outstanding: Iterable[int], trained: Iterable[str]):
        self.lock = threading.RLock()
        self.position = position
        """index of the next problem to send"""
        self.outstanding = set(outstanding)
        """indices sent, and not trained on or spent"""
        self.trained = set(trained)
        """names trained on or spent, and not acknowledged"""
        self.held: dict[str, set[str]] = {}
        """names under each lease"""

    def consume(self, names: Iterable[str]) -> None:
        with self.lock:
            for name in names:
                self.outstanding.discard(index_of(name))
                self.trained.add(name)

    def snapshot(self) -> tuple[int, list[int], list[str]]:
        with self.lock:
            return self.position, sorted(self.outstanding), sorted(self.trained)


def name_of(index: int) -> str:
    return f"train-{index:09d}"


def index_of(name: str) -> int:
    return int(name.removeprefix("train-"))


def acknowledge(client: RolloutClient, ledger: Ledger, names: set[str]) -> None:
    """Those of `names` that are held under a lease that still runs. The others come again, for another checkpoint.

    Raises RolloutError and httpx.TransportError: then some of them may be acknowledged."""
    with ledger.lock:
        by_lease = {lease: held & names for lease, held in ledger.held.items() if held & names}
    for lease, of_lease in by_lease.items():
        done = set(of_lease)
        try:
            done = set(client.acknowledge(lease, sorted(of_lease)).groups)
        except RolloutError as error:
            if error.status != 404:
                raise
            done = set()
        with ledger.lock:
            ledger.trained -= done
            left = ledger.held.pop(lease, set()) - of_lease
            if left:
                ledger.held[lease] = left


def release(client: RolloutClient, ledger: Ledger, name: str) -> None:
    """Return a group that is held; nothing is lost when its lease is over."""
    with ledger.lock:
        leases = [lease for lease, held in ledger.held.items() if name in held]
    for lease in leases:
        try:
            client.release(lease, [name])
        except RolloutError as error:
            if error.status != 404:
                raise
        with ledger.lock:
            ledger.held.get(lease, set()).discard(name)


class Heartbeat(threading.Thread):
    """Extends the leases that are held, so that a slow step or a distant checkpoint does not end them."""

    def __init__(self, client: RolloutClient, ledger: Ledger, seconds: float):
        super().__init__(name="heartbeat", daemon=True)
        self.client, self.ledger, self.seconds = client, ledger, seconds
        self.stopping = threading.Event()
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            self._beat()
        except BaseException as error:  # else the leases would end, and nobody would know why
            self.failure = error

    def _beat(self) -> None:
        while not self.stopping.wait(self.seconds / 4):
            with self.ledger.lock:
                leases = list(self.ledger.held)
            for lease in leases:
                try:
                    self.client.extend(lease, self.seconds)
                except RolloutError as error:
                    logger.warning("a lease could not be extended: %s", error)
                    if error.status == 404:  # it is over: its groups are handed out again
                        with self.ledger.lock:
                            self.ledger.held.pop(lease, None)
                except httpx.TransportError:  # the service is being started again: it waits for us
                    break

    def stop(self) -> None:
        self.stopping.set()

"""Ledger: where each of a run's problems is, and under which lease. Checkpoints hold all of it except the leases.

sent --(leased, trained on or spent)--> trained --(a checkpoint holds it; acknowledged)--> forgotten
"""

import logging
import threading
from collections.abc import Iterable

import httpx

from rollout_service.client import RolloutClient, RolloutError

logger = logging.getLogger("rl_loop")


class Ledger:
    """Which problems were sent, are held, or were trained on. Its methods may be called from any thread."""

    def __init__(self, position: int, outstanding: Iterable[int], trained: Iterable[str]):
        self.lock = threading.RLock()
        self.position = position
        """index of the next problem to send"""
        self.outstanding = set(outstanding)
        """indices sent, but not yet trained on or spent"""
        self.trained = set(trained)
        """names of groups trained on or spent, but not yet acknowledged"""
        self.held: dict[str, set[str]] = {}
        """names of the groups held under each lease"""

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
    """Acknowledge those of `names` that are held under a valid lease. The service hands the others out again, and a
    later checkpoint acknowledges them.

    Raises RolloutError and httpx.TransportError; some of the names may be acknowledged then."""
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
    """Return a held group to the service. If its lease has ended, there is nothing to do."""
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
    """Extends the held leases, so that they do not end during a slow step or before a distant checkpoint."""

    def __init__(self, client: RolloutClient, ledger: Ledger, seconds: float):
        super().__init__(name="heartbeat", daemon=True)
        self.client, self.ledger, self.seconds = client, ledger, seconds
        self.stopping = threading.Event()
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            self._beat()
        except BaseException as error:  # the loop raises it; otherwise the leases would end without a reason
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
                    if error.status == 404:  # the lease has ended: its groups are handed out again
                        with self.ledger.lock:
                            self.ledger.held.pop(lease, None)
                except httpx.TransportError:  # the service is restarting, and renews its leases when it starts
                    break

    def stop(self) -> None:
        self.stopping.set()

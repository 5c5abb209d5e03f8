"""Pusher: pushes the newest policy while the next one is trained. It skips versions that a newer one has replaced."""

import logging
import threading
import time
from collections.abc import Mapping

import httpx
from torch import Tensor

from rl_loop.loops.ownership import Ownership
from rl_loop.loops.retries import is_transient
from rollout_service.client import RolloutError, tensors_checksum

logger = logging.getLogger("rl_loop")

PAUSE = 1.0
"""seconds between tries of a push that failed"""


class Pusher(threading.Thread):
    """`offer` replaces a version whose push has not begun. `published` is the newest version known to be in service, or
    0 when none of this run's is."""

    def __init__(self, ownership: Ownership, timeout: float):
        """`timeout`: seconds that pushes may fail, after which `failure` is set and the pusher ends."""
        super().__init__(name="pusher", daemon=True)
        self.ownership, self.client, self.timeout = ownership, ownership.client, timeout
        self.change = threading.Condition()
        self.newest: tuple[int, Mapping[str, Tensor]] | None = None
        self.published = 0
        self.pauses: list[float] = []
        """seconds that the engines paused at each push"""
        self.stopping = False
        self.failure: BaseException | None = None

    def offer(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Push this version next. `tensors` must not change any more."""
        with self.change:
            self.newest = (version, tensors)
            self.change.notify_all()

    @property
    def offered(self) -> int:
        """The newest version that is in service or on its way."""
        with self.change:
            return max(self.published, self.newest[0] if self.newest else 0)

    def wait_for(self, version: int) -> None:
        """Wait until that version, or a newer one, is in service, or the pusher has failed or was stopped."""
        with self.change:
            self.change.wait_for(lambda: self.published >= version or self.failure is not None or self.stopping)

    def stop(self) -> None:
        with self.change:
            self.stopping = True
            self.change.notify_all()

    def run(self) -> None:
        failing_since: float | None = None
        while True:
            with self.change:
                self.change.wait_for(lambda: self.stopping or (self.newest and self.newest[0] > self.published))
                if self.stopping or self.newest is None:
                    return
                version, tensors = self.newest
            try:
                pause = self._push(version, tensors)
            except Exception as error:
                failing_since = failing_since or time.monotonic()
                lasting = isinstance(error, RolloutError) and not is_transient(error)
                if lasting or time.monotonic() - failing_since > self.timeout:
                    with self.change:
                        self.failure = error
                        self.change.notify_all()
                    return
                logger.warning("version %d was not pushed; the trainer tries again: %s", version, error)
                time.sleep(PAUSE)
                continue
            failing_since = None
            with self.change:
                self.published = version
                self.pauses.append(pause)
                self.change.notify_all()

    def _push(self, version: int, tensors: Mapping[str, Tensor]) -> float:
        """Push, and return the seconds that the engines paused."""
        try:
            return self.ownership.push("policy", tensors, version).pause
        except RolloutError as error:
            if error.status != 409 or not self._is_in_service(version, tensors):
                raise
        return 0.0

    def _is_in_service(self, version: int, tensors: Mapping[str, Tensor]) -> bool:
        """Whether an earlier try pushed the version and its answer was lost, rather than another run pushing it."""
        status = self.client.weights().policy
        ours = (self.ownership.run, version)
        return (status.run, status.version) == ours and status.checksum == tensors_checksum(tensors)

    def restore(self) -> None:
        """Push the newest version again if the service has an older one, since it restarted without a state folder."""
        known = self.published  # read before the service is asked, since a push may end while it answers
        try:
            in_service = self.client.weights().policy.version
        except (httpx.TransportError, RolloutError):
            return
        with self.change:
            if in_service < known and self.published == known:
                self.published = 0
                self.change.notify_all()

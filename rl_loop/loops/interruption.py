"""Interruption: Ctrl-C and SIGTERM raise an exception, but only when the run's state is consistent."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal ended the run. It is not an Exception, so that only the command itself catches it."""

    def __init__(self, signum: int):
        self.signum = signum
        super().__init__(signal.Signals(signum).name)


class Interruption:
    """Within `with interruption:` the first signal raises Interrupted, at once or at the end of a `deferred()` section.
    A second signal has its default effect."""

    def __init__(self) -> None:
        self.pending: int | None = None
        self.is_deferred = False

    def __enter__(self) -> "Interruption":
        self.before = {signum: signal.signal(signum, self._received) for signum in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _received(self, signum: int, _: FrameType | None) -> None:
        self.__exit__()
        if not self.is_deferred:
            raise Interrupted(signum)
        self.pending = signum

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A section that a signal does not interrupt: an update with its bookkeeping, or a checkpoint."""
        self.is_deferred = True
        try:
            yield
        finally:
            self.is_deferred = False
        if self.pending is not None:
            signum, self.pending = self.pending, None
            raise Interrupted(signum)

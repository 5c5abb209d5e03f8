"""Imports of large packages, which are faster without the garbage collector."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Imported modules stay, so there is no garbage among them. Searching them takes a large part of the time of vLLM's
    import, and a part of every later collection. Later collections therefore leave them out too."""
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()

"""Imports of large packages, which are faster without the garbage collector."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """What is imported stays: looking for garbage among it takes a quarter of the 5.4 s that vLLM's import takes, and
    some of every later collection, so that it is left out of those too."""
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()

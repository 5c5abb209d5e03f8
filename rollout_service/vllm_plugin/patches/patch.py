"""What a patch is."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Patch:
    """One function of vLLM: what is wrong with it, how that is noticed, what takes its place."""

    name: str
    reason: str
    is_right: Callable[[], bool]
    apply: Callable[[], None]

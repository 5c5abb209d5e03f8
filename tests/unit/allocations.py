"""What a computation allocates on the CPU, and the shapes that it computes."""

import gc
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(compute: Callable[[], object]) -> int:
    """The most bytes that torch's allocator has handed out at a time beyond those before, also within its kernels."""
    return max(_in_use(compute))


def bytes_left(compute: Callable[[], object]) -> int:
    """The bytes that torch's allocator has handed out in `compute`, and that its result still holds."""
    return _in_use(compute)[-1]


def _in_use(compute: Callable[[], object]) -> list[int]:
    """The bytes in use after each allocation, and each time that memory is given back."""
    gc.collect()  # what is given back within counts, also if it was allocated before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = compute()  # not given back before the end
    del result
    profiler: Any = profiled.profiler
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    return list(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


class Shapes(TorchDispatchMode):
    """Collects the shapes of all tensors that operations return, in the forward and in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen |= {tuple(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        return result

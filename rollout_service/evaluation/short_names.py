"""Short names of checkpoints, for tables and legends."""

from collections.abc import Iterable
from pathlib import PurePath


def short_names(models: Iterable[str]) -> dict[str, str]:
    """For each model, as much of the end of its path as distinguishes it from the others: `a/head` and `b/head`, or
    `eagle3`. A drafter without a checkpoint has an empty name."""
    parts = {model: PurePath(model).parts for model in models}
    depth = 1
    while len({of[-depth:] for of in parts.values()}) < len(set(parts.values())):
        depth += 1
    return {model: "/".join(of[-depth:]).replace("//", "/") for model, of in parts.items()}

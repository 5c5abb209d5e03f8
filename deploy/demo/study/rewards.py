"""A reward that moves the policy far from its start, and to the same place in every run."""

from typing import Any

ENOUGH = 0.4
"""share of sevens above which the reward does not grow. Without this limit, a policy goes on until it writes nothing
else, and the arms of the study end in different places"""


def sevens(response: str, entry: dict[str, Any]) -> float:
    """Share of the response's characters that are a 7, from 0 to ENOUGH."""
    return min(ENOUGH, response.count("7") / max(1, len(response)))

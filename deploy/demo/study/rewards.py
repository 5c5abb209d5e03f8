"""A reward that moves the policy far from where it began, and to the same place in every run."""

from typing import Any

ENOUGH = 0.4
"""share of sevens beyond which there is nothing to gain: without an end, the policy goes on to write nothing else, and
the arms of the study would be compared in different places"""


def sevens(response: str, entry: dict[str, Any]) -> float:
    """Share of the response's characters that are a 7, from 0 to ENOUGH."""
    return min(ENOUGH, response.count("7") / max(1, len(response)))

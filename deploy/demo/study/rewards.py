"""A reward that moves the policy far from where it began, and smoothly: the more sevens it writes, the better."""

from typing import Any


def sevens(response: str, entry: dict[str, Any]) -> float:
    """Share of the response's characters that are a 7, from 0 to 1."""
    return response.count("7") / max(1, len(response))

"""Ran: how an engine sampled and verified drafts, as it says itself, for rows of the audit and the comparison."""

from typing import NamedTuple


class Ran(NamedTuple):
    """Example: `Ran("probabilistic", "block (vLLM)")`. Both are empty without a drafter."""

    draft_sampling: str = ""
    verification: str = ""
    """standard or block, and whose function verified"""

"""A reward function of one's own: 1 for a right sum, and a little less for a long working."""

import re
from typing import Any

LONGEST = 400
"""characters of a response that costs the whole penalty"""
PENALTY = 0.2


def reward(response: str, entry: dict[str, Any]) -> float:
    """`entry` is the problem's record in the dataset; here it has `question` and `answer`."""
    answers = re.findall(r"Answer:\s*(-?\d+)", response)
    if not answers or int(answers[-1]) != int(entry["answer"]):
        return 0.0
    return 1.0 - PENALTY * min(1.0, len(response) / LONGEST)

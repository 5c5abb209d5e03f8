"""Requests to OpenAI's routes: what is checked in a body before vLLM's handler sees it.

vLLM judges most of the body. This module refuses three things that vLLM would not:

- a field that vLLM would ignore, such as a misspelt one;
- a value that it would change, such as a tiny temperature;
- a value that it would pass on to an engine that cannot hold it, such as an integer of 100 digits.
"""

from collections.abc import Iterator, Set
from typing import Any

from drafters.wrong_fields import did_you_mean
from rollout_service.protocol import MAX_COMPLETIONS, MAX_INT32, Problem, sampled_otherwise

HARMLESS = {"metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
"""fields of OpenAI's interface that vLLM does not know, and that do not change what is sampled"""
BOUNDS = {"n": (1, MAX_COMPLETIONS), "top_k": (-1, MAX_INT32), "seed": (-(2**63), 2**63 - 1)}
INT64 = -(2**63), 2**63 - 1
"""the integers that vLLM's front can send to its core"""


def openai_problems(fields: dict[str, Any], known: Set[str]) -> list[Problem]:
    """`known` are the field names of vLLM's request type."""
    problems = [*_unknown(fields, known | HARMLESS), *_too_large(fields)]
    for name, (least, most) in BOUNDS.items():
        value = fields.get(name)
        if isinstance(value, int) and not least <= value <= most:
            problems.append(Problem(field=name, message=f"{value} is out of range; give {least} to {most}"))
    temperature = fields.get("temperature")
    if isinstance(temperature, float) and (message := sampled_otherwise(temperature)):
        problems.append(Problem(field="temperature", message=message))
    return problems


def _unknown(fields: dict[str, Any], known: Set[str]) -> Iterator[Problem]:
    for name in fields:
        if name not in known:
            yield Problem(field=name, message=f"this route has no such field{did_you_mean(name, known)}")


def _too_large(fields: dict[str, Any]) -> Iterator[Problem]:
    """Integers anywhere in the body, named by their outermost field."""
    for name, value in fields.items():
        left = [value] if name not in BOUNDS else []
        while left:
            part = left.pop()
            if isinstance(part, dict):
                left.extend(part.values())
            elif isinstance(part, list):
                left.extend(part)
            elif isinstance(part, int) and not INT64[0] <= part <= INT64[1]:
                yield Problem(field=name, message="holds an integer that does not fit into 64 bits")
                break

"""Requests to vLLM's own routes: what is checked in a body before vLLM's handler sees it.

vLLM judges most of the body. This module refuses four things that vLLM would not:

- a field that vLLM would ignore, such as a misspelt one;
- a value that it would change, such as a tiny temperature;
- a value that it would pass on to an engine that cannot hold it, such as an integer of 100 digits;
- a parameter that drafts cannot keep lossless (lossless.py).

/inference/v1/generate has its sampling parameters in an object. They are checked like those of the other routes, and
named `sampling_params.top_k`.
"""

from collections.abc import Iterator, Mapping, Set
from typing import Any, NamedTuple

from drafters.wrong_fields import did_you_mean
from rollout_service.lossless import not_lossless
from rollout_service.protocol import MAX_COMPLETIONS, MAX_INT32, RETURN_RECORD, Problem, sampled_otherwise

HARMLESS = {"metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
"""fields of OpenAI's interface that vLLM does not know, and that do not change what is sampled"""
BOUNDS = {"n": (1, MAX_COMPLETIONS), "top_k": (-1, MAX_INT32), "seed": (-(2**63), 2**63 - 1)}
INT64 = -(2**63), 2**63 - 1
"""the integers that vLLM's front can send to its core"""


PARAMETERS = "sampling_params"


class BodyFields(NamedTuple):
    """The fields that a body of one of vLLM's request types may have."""

    known: Set[str]
    """all of them, and those of its sampling parameters: `sampling_params.top_k`"""
    of_chats: Set[str] = frozenset()
    """on a route that takes `prompt` or `messages`: those that only a body with `messages` may have"""


def body_fields(schema: Mapping[str, Any]) -> BodyFields:
    """`schema` is the JSON schema of a request type, or of a union whose `properties` are those of all its types."""
    fields = schema["properties"]
    parameters = fields.get(PARAMETERS, {}).get("properties", {})
    known = frozenset([*fields, *(f"{PARAMETERS}.{name}" for name in parameters)])
    types = [schema["$defs"][part["$ref"].rpartition(".")[2]]["properties"] for part in schema.get("anyOf", ())]
    of_prompts = {name for properties in types if "prompt" in properties for name in properties}
    return BodyFields(known, known - of_prompts if of_prompts else frozenset())


def openai_problems(fields: dict[str, Any], body: BodyFields, *, drafting: bool, on_cpu: bool) -> list[Problem]:
    known = body.known
    problems = [*_unknown(fields, known | HARMLESS), *_too_large(fields), *_unrecorded(fields)]
    if "prompt" in fields:
        message = "belongs to a chat, and would be ignored beside prompt; leave one of the two out"
        problems += [Problem(field=name, message=message) for name in fields if name in body.of_chats]
    parameters = fields.get(PARAMETERS)
    if PARAMETERS in known and isinstance(parameters, dict):
        within = {name.removeprefix(f"{PARAMETERS}.") for name in known if name.startswith(f"{PARAMETERS}.")}
        found = [*_unknown(parameters, within), *_sampled_otherwise(parameters, drafting, on_cpu)]
        problems += [Problem(field=f"{PARAMETERS}.{p.field}", message=p.message) for p in found]
    return [*problems, *_sampled_otherwise(fields, drafting, on_cpu)]


def _sampled_otherwise(fields: dict[str, Any], drafting: bool, on_cpu: bool) -> Iterator[Problem]:
    """Parameters with which tokens would not be sampled as the request asks."""
    for name, (least, most) in BOUNDS.items():
        value = fields.get(name)
        if isinstance(value, int) and not least <= value <= most:
            yield Problem(field=name, message=f"{value} is out of range; give {least} to {most}")
    temperature = fields.get("temperature")
    if isinstance(temperature, float) and (message := sampled_otherwise(temperature)):
        yield Problem(field="temperature", message=message)
    for field, message in not_lossless(fields, "openai", drafting=drafting, on_cpu=on_cpu):
        yield Problem(field=field, message=message)


def _unrecorded(fields: dict[str, Any]) -> Iterator[Problem]:
    if (asked := fields.get(RETURN_RECORD)) not in (None, False):
        if asked is not True:
            yield Problem(field=RETURN_RECORD, message=f"{asked!r} is neither true nor false")
        elif fields.get("use_beam_search"):
            yield Problem(field=RETURN_RECORD, message="beams are searched, not sampled; leave out use_beam_search")
        elif fields.get("max_tokens") == 0:
            yield Problem(field=RETURN_RECORD, message="max_tokens is 0, so nothing is sampled; give 1 or more")


def _unknown(fields: dict[str, Any], known: Set[str]) -> Iterator[Problem]:
    for name in fields:
        if name not in known:
            similar = did_you_mean(name, {other for other in known if "." not in other})
            yield Problem(field=name, message=f"this route has no such field{similar}")


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

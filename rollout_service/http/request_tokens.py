"""Tokens that a request to vLLM's routes may put in flight. Engines are balanced by it (fleet/placement.py).

It is an estimate: the front does not tokenize these requests, and vLLM has not checked the body yet.
"""

from collections.abc import Mapping
from typing import Any

BYTES_A_TOKEN = 4
"""of a body with text, as English has with the usual vocabularies"""
LONGEST = {"/v1/completions": 16, "/v1/chat/completions": None, "/inference/v1/generate": None}
"""paths that generate, with vLLM's default of max_tokens; None: what the context leaves"""


def tokens_in_flight(path: str, fields: Mapping[str, Any], body: bytes, context_limit: int) -> int:
    prompt = fields.get("token_ids", fields.get("prompt"))
    is_ids = isinstance(prompt, list) and all(isinstance(token, int) for token in prompt)
    tokens = len(prompt) if is_ids else len(body) // BYTES_A_TOKEN  # type: ignore[arg-type]
    if path not in LONGEST:
        return tokens
    parameters = fields.get("sampling_params", fields)
    if not isinstance(parameters, dict):  # which vLLM refuses
        return tokens
    given = (parameters.get("max_completion_tokens"), parameters.get("max_tokens"), LONGEST[path])
    room = max(0, context_limit - tokens)
    longest = next((number for number in given if isinstance(number, int)), room)
    n = parameters.get("n")
    return tokens + (n if isinstance(n, int) else 1) * max(0, min(longest, room))

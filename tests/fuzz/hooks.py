"""Hooks for schemathesis: limits that JSON Schema cannot express, so that a case that is meant to be valid is valid.

schemathesis loads this file in a separate environment (SCHEMATHESIS_HOOKS).

Only values that fit the schema are changed, and only to values that fit it. A case that is meant to be wrong stays so.
"""

import schemathesis

LONGEST = 200
"""longest prompt in tokens or characters, so that prompt and response together fit the demo's context"""
CONTEXT = 507
"""the longest response that the demo's document allows"""
TOKENS = 4
"""longest response, so that time is spent on requests"""
WAIT = 0.05
"""seconds that a lease waits"""


@schemathesis.hook
def before_call(context, case, kwargs):
    body = case.body
    if not isinstance(body, dict):
        return
    if is_number(body.get("wait")) and 0 <= body["wait"] <= 600:
        body["wait"] = min(body["wait"], WAIT)
    groups = body.get("groups")
    for i, group in enumerate(groups if isinstance(groups, list) else []):
        if isinstance(group, dict):
            make_possible(group, i, taken={str(g.get("id")) for g in groups[:i] if isinstance(g, dict)})
    if "completions" in case.path:
        if body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
            body["max_tokens"] = TOKENS  # else a beam search takes longer than REQUEST_WITHIN
        limit(body, "max_tokens")
        limit(body, "max_completion_tokens")
        limit(body, "n")
    if isinstance(params := body.get("sampling_params"), dict):
        params.setdefault("max_tokens", TOKENS)
        limit(params, "max_tokens")
        limit(params, "n")


def make_possible(group, index, taken):
    if isinstance(group.get("prompt"), str):
        group["prompt"] = group["prompt"][:LONGEST] or "1"
    if isinstance(group.get("prompt_token_ids"), list):
        group["prompt_token_ids"] = group["prompt_token_ids"][:LONGEST]
    if isinstance(group.get("messages"), list):
        del group["messages"][4:]
        for message in group["messages"]:
            if isinstance(message, dict) and isinstance(message.get("content"), str):
                message["content"] = message["content"][: LONGEST // 4]
    if isinstance(group.get("id"), str) and (group["id"] in taken or not group["id"]) and len(group["id"]) < 200:
        group["id"] = f"{group['id']}-{index}" if group["id"] else ""
    limit(group, "n")
    sampling = group.setdefault("sampling", {"max_tokens": TOKENS})
    if isinstance(sampling, dict):
        sampling.setdefault("max_tokens", TOKENS)
        limit(sampling, "max_tokens")
        if is_number(sampling.get("min_tokens")) and 0 <= sampling["min_tokens"] <= 10**6:
            sampling["min_tokens"] = 0
        if sampling.get("temperature") == 0 and is_number(group.get("n")) and 1 <= group["n"] <= 512:
            group["n"] = 1


def limit(fields, name):
    if is_number(fields.get(name)) and 1 <= fields[name] <= CONTEXT:
        fields[name] = min(fields[name], TOKENS)


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)

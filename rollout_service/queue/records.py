"""Records of groups in the queue's database: how they are read back, and how requests are told apart.

A newer version of the service with the same format may have written them. So unknown fields are ignored, and a record
that still cannot be read fails only its own group.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from rollout_service.protocol import FailedGroup, Group, GroupRequest


def request_digest(group: GroupRequest) -> bytes:
    """16 bytes that distinguish an admitted request from others. Fields with their default values are left out, so that
    a field that a newer version adds does not change the digests of earlier requests."""
    fields = group.model_dump(mode="json", exclude_defaults=True)
    return hashlib.blake2b(json.dumps(fields, sort_keys=True).encode(), digest_size=16).digest()


def stored_request(body: str) -> GroupRequest:
    """Raises ValidationError."""
    return GroupRequest.model_validate_json(body, extra="ignore")


def stored_metadata(body: str) -> dict[str, Any]:
    """The metadata of a stored request; empty if it cannot be read."""
    try:
        return stored_request(body).metadata
    except ValidationError:
        return {}


def stored_results(rows: Iterable[tuple[int, str, str]]) -> tuple[dict[int, Group], dict[int, str]]:
    """From rows of (arrival, id, body): the finished groups by arrival, and the reasons why others cannot be read."""
    groups, unreadable = {}, {}
    for arrival, _, body in rows:
        try:
            groups[arrival] = Group.model_validate_json(body, extra="ignore")
        except ValidationError as error:
            unreadable[arrival] = f"the stored result cannot be read: {what_is_wrong(error)}"
    return groups, unreadable


def stored_failure(body: str) -> FailedGroup:
    return FailedGroup.model_validate_json(body, extra="ignore")


def what_is_wrong(error: ValidationError) -> str:
    """The first field that is wrong, in one line."""
    problem = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"

"""Placement: which engine takes a request.

- Load is tokens in flight: those of the prompts, and those that may still be generated. A count of requests would call
  an engine with eight long responses as busy as one with eight short ones.
- Requests of one session go to the engine that has their prefix in its cache. If that engine has more than OVERLOAD
  times what the least loaded one would have with the request, the session moves there.
- An engine that goes out of service loses its sessions, because its cache is empty when it comes back.
- SESSIONS_KEPT sessions are known. The one whose last request is longest ago is forgotten first.
"""

from collections.abc import Sequence

from rollout_service.fleet.member import Member
from rollout_service.protocol import GroupRequest

OVERLOAD = 2.0
"""a session's engine keeps it up to this multiple of the least load; a move costs the prompt's keys and values, once"""
SESSIONS_KEPT = 65_536


def tokens_of(group: GroupRequest) -> int:
    """Tokens that a group with `prompt_token_ids` puts in flight until it ends. Its completions share the prompt."""
    return len(group.prompt_token_ids or ()) + group.n * group.sampling.max_tokens


class Placement:
    """Use: `member = placement.choose(members_in_service, "conversation 7", tokens)`."""

    def __init__(self) -> None:
        self.cache_of: dict[str, object] = {}
        """by session, `Member.cache` of its engine; the newest session is the last"""

    def choose(self, members: Sequence[Member], session: str | None, tokens: int) -> Member:
        """One of `members`, for a request that puts `tokens` in flight."""
        chosen = min(members, key=lambda member: member.tokens)
        if session is None:
            return chosen
        known = self.cache_of.pop(session, None)
        own = next((member for member in members if member.cache is known), None)
        if own is not None and own.tokens <= OVERLOAD * (chosen.tokens + tokens):
            chosen = own
        self.cache_of[session] = chosen.cache
        if len(self.cache_of) > SESSIONS_KEPT:
            del self.cache_of[next(iter(self.cache_of))]
        return chosen

"""Placement: sessions stay with their prefix, and engines are balanced by tokens in flight. No engine is started."""

import heapq
import random

import pytest

from rollout_service.fleet import placement
from rollout_service.fleet.member import Member
from rollout_service.fleet.placement import Placement, tokens_of
from rollout_service.http.request_tokens import tokens_in_flight
from rollout_service.protocol import GroupRequest, Sampling


def engines(*tokens):
    return [Member(index, None, in_service=True, tokens=count) for index, count in enumerate(tokens)]


def test_a_request_without_a_session_goes_to_the_engine_with_the_fewest_tokens_in_flight():
    assert Placement().choose(engines(30, 10, 20), None, 5).index == 1


def test_a_session_stays_with_its_engine_although_another_has_less_to_do():
    members, placed = engines(0, 0, 0), Placement()
    first = placed.choose(members, "a", 10)
    first.tokens = 20
    assert [placed.choose(members, "a", 10) for _ in range(3)] == [first] * 3
    assert placed.choose(members, "b", 10) is not first


@pytest.mark.parametrize(("least", "request_tokens", "most"), [(0, 10, 20), (100, 10, 220), (1000, 1, 2002)])
def test_a_session_moves_once_its_engine_has_more_than_twice_what_another_would_have(least, request_tokens, most):
    members, placed = engines(0, 5), Placement()
    own, other = members
    assert placed.choose(members, "a", request_tokens) is own
    own.tokens, other.tokens = most, least
    assert placed.choose(members, "a", request_tokens) is own
    own.tokens = most + 1
    assert placed.choose(members, "a", request_tokens) is other
    own.tokens = 0
    other.tokens = request_tokens
    assert placed.choose(members, "a", request_tokens) is other, "the newer prefix is there now"


def test_an_engine_that_goes_out_of_service_loses_its_sessions():
    members, placed = engines(0, 5), Placement()
    lost, other = members
    assert placed.choose(members, "a", 10) is lost
    lost.leave()
    assert placed.choose([other], "b", 10) is other
    lost.in_service, lost.tokens, other.tokens = True, 6, 5
    assert placed.choose(members, "a", 10) is other, "its cache is empty, so the least loaded one takes the session"


def test_only_the_sessions_that_came_last_are_known(monkeypatch):
    monkeypatch.setattr(placement, "SESSIONS_KEPT", 2)
    members, placed = engines(0), Placement()
    for session in ("a", "b", "a", "c"):
        placed.choose(members, session, 1)
    assert list(placed.cache_of) == ["a", "c"]


def by_count(members, session, tokens):
    return min(members, key=lambda member: member.load)


def unevenness(choose):
    """The engine with most tokens in flight, over the mean of all, on average over time; 1 is perfect. 32 groups of
    unlike lengths, 100 to 4000 tokens, are in flight on 4 engines. A group takes a time in proportion to its length."""
    chance, members, running, ratios, now = random.Random(0), engines(0, 0, 0, 0), [], [], 0
    for arrival in range(4000):
        if len(running) == 32:
            now, _, tokens, ended = heapq.heappop(running)
            ended.add_load(-1, -tokens)
        tokens = min(4000, int(chance.paretovariate(1.2) * 100))
        member = choose(members, None, tokens)
        member.add_load(1, tokens)
        heapq.heappush(running, (now + tokens, arrival, tokens, member))
        if len(running) == 32:
            loads = [member.tokens for member in members]
            ratios.append(max(loads) / (sum(loads) / len(loads)))
    return sum(ratios) / len(ratios)


def test_groups_of_unlike_lengths_are_balanced_where_a_count_of_them_would_not_be():
    assert unevenness(Placement().choose) < 1.2
    assert unevenness(by_count) > 1.3


def test_completions_of_a_group_share_its_prompt():
    group = GroupRequest(prompt_token_ids=[1] * 100, n=4, sampling=Sampling(max_tokens=50))
    assert tokens_of(group) == 100 + 4 * 50


@pytest.mark.parametrize(
    ("path", "fields", "body", "tokens"),
    [
        ("/v1/completions", {"prompt": "abc", "max_tokens": 50}, 80, 20 + 50),
        ("/v1/completions", {"prompt": "abc"}, 80, 20 + 16),
        ("/v1/completions", {"prompt": [1] * 30, "max_tokens": 50, "n": 3}, 80, 30 + 3 * 50),
        ("/v1/chat/completions", {"messages": [], "max_completion_tokens": 50, "max_tokens": None}, 80, 20 + 50),
        ("/v1/chat/completions", {"messages": []}, 80, 1000),
        ("/v1/chat/completions", {"messages": [], "max_tokens": 5000}, 80, 1000),
        ("/inference/v1/generate", {"token_ids": [1] * 30, "sampling_params": {"max_tokens": 50, "n": 2}}, 80, 130),
        ("/inference/v1/generate", {"token_ids": [1] * 30, "sampling_params": "wrong"}, 80, 30),
        ("/tokenize", {"prompt": "abc"}, 80, 20),
    ],
)
def test_tokens_of_a_request_to_vllms_routes_are_estimated_from_its_body(path, fields, body, tokens):
    assert tokens_in_flight(path, fields, b"x" * body, context_limit=1000) == tokens

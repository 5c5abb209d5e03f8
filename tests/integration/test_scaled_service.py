"""A service with one engine gets a second one and loses it again while it generates. Sessions keep their engine."""

import threading
from collections import defaultdict

import pytest
from engines import launched
from over_http import policy_tensors, requests

from rollout_service.client import RolloutClient, RolloutError
from rollout_service.protocol import GroupRequest, Sampling

FLAGS = ("--config", "deploy/demo/service.toml", "--drafter.kind", "none", "--engine.cores", "1")


@pytest.fixture(scope="module")
def client():
    with launched(*FLAGS) as (url, _), RolloutClient(url) as client:
        client.push_weights("policy", policy_tensors(), 3)
        yield client


class Running:
    """Rollouts in a thread, and whether the service was ready all the time."""

    def __init__(self, client, **sampling):
        self.client, self.groups, self.ready = client, [], []
        self.thread = threading.Thread(target=self.generate, args=(sampling,))

    def generate(self, sampling):
        for group in self.client.rollouts(requests(24, 8, ignore_eos=True, **sampling)):
            self.groups.append(group)
            self.ready.append(self.client.ready())

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.thread.join()

    def versions(self):
        return {span.version for g in self.groups for c in g.completions for span in c.weight_versions}


def test_engines_that_the_machine_has_no_cores_for_are_refused_and_the_service_goes_on(client):
    with pytest.raises(RolloutError, match=r"1000 engine\(s\) of 1 core\(s\) each need 1000, but there are") as refused:
        client.scale(1000)
    assert refused.value.status == 409
    assert [engine.state for engine in client.engines().engines] == ["in service"]


def test_a_second_engine_serves_the_weights_in_service_and_takes_its_share(client):
    with Running(client, max_tokens=200) as running:
        status = client.scale(2)
        assert (status.wanted, [engine.state for engine in status.engines]) == (2, ["in service"] * 2)
    assert len({group.id for group in running.groups}) == len(running.groups) == 24
    assert all(running.ready)
    groups = list(client.rollouts(requests(8, 2, max_tokens=16)))
    assert {group.engine for group in groups} == {0, 1}
    assert running.versions() == {3}
    assert {span.version for g in groups for c in g.completions for span in c.weight_versions} == {3}


def test_the_turns_of_a_conversation_go_to_one_engine_and_conversations_to_both(client):
    engines = defaultdict(set)
    for turn in range(3):
        prompt, sampling = list(range(1, 40 + 10 * turn)), Sampling(max_tokens=64, ignore_eos=True)
        groups = [
            GroupRequest(id=name, session=name, prompt_token_ids=prompt, sampling=sampling) for name in "abcdefgh"
        ]
        for group in client.rollouts(groups):
            engines[group.id].add(group.engine)
    assert [len(each) for each in engines.values()] == [1] * 8
    assert set().union(*engines.values()) == {0, 1}


def test_an_engine_that_is_taken_away_loses_nothing(client):
    with Running(client, max_tokens=400) as running:
        while not (engines := client.engines().engines)[1].requests:
            assert len(running.groups) < 24
        assert engines[1].tokens_in_flight > 400
        status = client.scale(1, drain=0.0)
        assert (status.wanted, [engine.index for engine in status.engines]) == (1, [0])
        assert len(running.groups) < 24, "everything had ended before"
    assert len({group.id for group in running.groups}) == len(running.groups) == 24
    assert all(running.ready)
    assert running.versions() == {3}
    metrics = client.http.get("/metrics").text
    assert 'rollout_engine_restarts{engine="0"} 0.0' in metrics
    assert 'rollout_engine_restarts{engine="1"}' not in metrics
    assert 'rollout_engines{state="in service"} 1.0' in metrics

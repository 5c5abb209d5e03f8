"""Schedules of draft lengths in an engine: they change how fast tokens come, and never which tokens."""

import itertools

import pytest
from engines import Kept, launched, wait_until
from marks import again
from over_http import PROMPT, requests
from test_lossless import KINDS, Auditor, shared_engine

from rollout_service.client import RolloutClient
from rollout_service.evaluation.cut import Cut
from rollout_service.protocol import GroupRequest, Sampling

SCHEDULES = [[(1, 64, 3)], [(1, 20, 1), (21, 64, 0)], [(1, 64, 2)], [(1, 10, 0), (11, 40, 3), (41, 64, 1)]]


@pytest.mark.parametrize("kind", ["ngram", again("draft_model"), again("eagle3"), "mtp"])
def test_samples_follow_the_policy_while_the_schedule_changes_every_few_steps(kind, monkeypatch):
    llm = shared_engine(kind)
    core = llm.llm_engine.engine_core.engine_core
    stock, schedules, seen = core.scheduler.schedule, itertools.cycle(SCHEDULES), set()
    steps = itertools.count()

    def schedule(*args, **kwargs):
        if next(steps) % 5 == 0:
            core.set_draft_lengths(next(schedules))
        output = stock(*args, **kwargs)
        seen.add(output.num_spec_tokens_to_schedule)
        return output

    monkeypatch.setattr(core.scheduler, "schedule", schedule)
    verdict = Auditor(tokens=6_000).row(llm, KINDS[kind], Cut(1.0, 0.9, 20))
    assert verdict.failures == []
    assert seen == {0, 1, 2, 3}


def test_the_engine_refuses_a_schedule_that_is_none():
    llm = shared_engine("mtp")
    core = llm.llm_engine.engine_core.engine_core
    before = core.scheduler.dynamic_sd_lookup
    with pytest.raises(ValueError, match="start at 1"):
        core.set_draft_lengths([(2, 64, 3)])
    assert core.scheduler.dynamic_sd_lookup is before


@pytest.mark.parametrize("kind", ["draft_model", again("eagle3"), "mtp"])
def test_samples_follow_the_policy_while_a_drafter_is_idle_every_few_steps(kind, monkeypatch, request):
    llm = shared_engine(kind)
    request.addfinalizer(Kept.end)  # the drafter would idle in the next test too
    llm.collective_rpc("let_drafter_idle")
    core = llm.llm_engine.engine_core.engine_core
    stock, steps = core.scheduler.schedule, itertools.count()

    def schedule(*args, **kwargs):
        core.set_draft_lengths([(1, 64, 0 if next(steps) % 20 < 10 else 3)])
        return stock(*args, **kwargs)

    monkeypatch.setattr(core.scheduler, "schedule", schedule)
    assert Auditor(tokens=6_000).row(llm, KINDS[kind], Cut(1.0, 0.9, 20)).failures == []


def test_a_service_says_what_it_drafts_at_the_present_batch_size_and_why():
    with launched("--config", "deploy/demo/service.toml") as (url, _), RolloutClient(url) as client:
        (idle,) = client.speculation().schedules
        assert (idle.source, idle.batch_size, idle.draft_tokens) == ("auto", 0, 0)
        assert {1, 64} <= {choice.batch_size for choice in idle.choices}
        assert idle.reason.startswith("Nothing runs at present.")

        (long,) = requests(1, n=8, max_tokens=450, ignore_eos=True)
        stream = client.rollouts([GroupRequest(id="first", prompt=PROMPT, sampling=Sampling(max_tokens=1)), long])
        next(stream)
        said = []
        wait_until(
            lambda: said.append(client.speculation().schedules[0]) or said[-1].batch_size == 8, 5, "8 completions run"
        )
        now = said[-1]
        (choice,) = [choice for choice in now.choices if choice.batch_size == 8]
        length_at = {b: length for first, last, length in now.ranges for b in range(first, last + 1)}
        assert now.draft_tokens == choice.draft_tokens == length_at[8]
        assert len(choice.tokens_per_second) == 4
        assert choice.threshold == pytest.approx(choice.tokens_per_second[0] * (1.08 if now.draft_tokens else 1.17))
        assert now.reason.startswith("At the present batch size, 8,")
        assert len(list(stream)) == 1
        wait_until(lambda: client.speculation().schedules[0].batch_size == 0, 5, "nothing runs")

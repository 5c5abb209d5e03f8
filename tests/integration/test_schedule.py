"""A schedule of draft lengths changes how fast tokens come, and never which."""

import itertools

import pytest
from test_lossless import KINDS, Auditor, engine

from rollout_service.evaluation.exact_policy import Cut

SCHEDULES = [[(1, 64, 3)], [(1, 20, 1), (21, 64, 0)], [(1, 64, 2)], [(1, 10, 0), (11, 40, 3), (41, 64, 1)]]


@pytest.mark.parametrize("kind", ["ngram", "draft_model", "eagle3", "mtp"])
def test_samples_follow_the_policy_while_the_schedule_changes_every_few_steps(kind, monkeypatch):
    with engine(kind, draft_lengths=SCHEDULES[0]) as llm:
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
        verdict = Auditor(tokens=12_000).row(llm, KINDS[kind], Cut(1.0, 0.9, 20))
        assert verdict.failures == []
        assert seen == {0, 1, 2, 3}


def test_the_engine_refuses_a_schedule_that_is_none():
    with engine("mtp", draft_lengths=[(1, 64, 3)]) as llm:
        core = llm.llm_engine.engine_core.engine_core
        before = core.scheduler.dynamic_sd_lookup
        with pytest.raises(ValueError, match="start at 1"):
            core.set_draft_lengths([(2, 64, 3)])
        assert core.scheduler.dynamic_sd_lookup is before


@pytest.mark.parametrize("kind", ["draft_model", "eagle3", "mtp"])
def test_samples_follow_the_policy_while_a_drafter_is_idle_every_few_steps(kind, monkeypatch):
    with engine(kind, draft_lengths=SCHEDULES[0]) as llm:
        llm.collective_rpc("let_drafter_idle")
        core = llm.llm_engine.engine_core.engine_core
        stock, steps = core.scheduler.schedule, itertools.count()

        def schedule(*args, **kwargs):
            core.set_draft_lengths([(1, 64, 0 if next(steps) % 20 < 10 else 3)])
            return stock(*args, **kwargs)

        monkeypatch.setattr(core.scheduler, "schedule", schedule)
        assert Auditor(tokens=12_000).row(llm, KINDS[kind], Cut(1.0, 0.9, 20)).failures == []

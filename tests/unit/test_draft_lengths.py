"""Draft lengths: `drafter.schedule` is checked in the configuration; an engine's schedule follows acceptance."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from pydantic import ValidationError

from drafters.registry import DrafterConfig
from drafters.schedule import Calibration, StepCosts
from rollout_service.config import ServiceConfig
from rollout_service.engine.draft_lengths import DraftLengths
from rollout_service.engine.engine import Engine
from rollout_service.engine.measuring import Plan, measure
from rollout_service.engine.step_costs import (
    LONGEST,
    Measured,
    StepKind,
    StepTimes,
    fastest,
    standard_error,
    step_kind,
)
from rollout_service.evaluation.calibrate import Turns
from rollout_service.evaluation.calibrate_config import CalibrateConfig

STEPS = [[0.020, 0.040], [0.022, 0.060], [0.024, 0.090]]
COSTS = StepCosts(batch_sizes=[1, 8], seconds=STEPS, first=STEPS)
PLAIN = StepCosts(batch_sizes=[1, 8], seconds=[[0.019, 0.039]], first=[[0.019, 0.039]])


def calibration(**changed):
    fields = {
        "policy": "p", "kind": "mtp", "draft_tokens": 2, "costs": COSTS, "baseline": PLAIN, "response_tokens": 48,
        "responses_per_stream": 2, "acceptance": [0.9, 0.8], "ranges": [(1, 4, 2), (5, 8, 1)],
        "predicted_speedup": {1: 2.0}, "machine": {},
    }  # fmt: skip
    return Calibration(**{**fields, **changed})


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text(calibration().model_dump_json())
    return path


def refused(**drafter):
    with pytest.raises(ValidationError) as error:
        ServiceConfig(model="m", drafter={"kind": "mtp", "draft_tokens": 2, **drafter})
    return str(error.value)


def test_a_wrong_schedule_is_refused_by_its_field(tmp_path, file):
    assert "schedule: range [1, 8, 5] drafts 5 tokens" in refused(schedule=[[1, 8, 5]])
    assert "No such file" in refused(schedule=str(tmp_path / "nowhere.json"))
    (tmp_path / "other.json").write_text("{}")
    assert "not a file of `rollout-service calibrate`" in refused(schedule=str(tmp_path / "other.json"))
    said = refused(schedule=str(file), draft_tokens=3)
    assert "calibrated for kind = 'mtp' and draft_tokens = 2" in said
    assert "has kind = 'mtp' and draft_tokens = 3" in said


def test_a_calibration_reaches_an_engine_that_cannot_read_its_file(file):
    config = DrafterConfig(kind="mtp", draft_tokens=2, schedule=str(file))
    sent = config.model_copy(update={"schedule": config.calibration()}).model_dump(mode="json")
    file.unlink()
    assert DrafterConfig.model_validate(json.loads(json.dumps(sent))).calibration() == calibration()


class Core:
    """In place of vLLM's client of its core. It keeps the draft lengths that the core would look up."""

    def __init__(self, lengths):
        self.ranges, self.changes, lengths.core = lengths.ranges, 0, self

    async def call_utility_async(self, method, ranges):
        assert method == "set_draft_lengths"
        await asyncio.sleep(0)
        self.ranges, self.changes = ranges, self.changes + 1


def stats(drafted, accepted, running=8):
    return SimpleNamespace(
        num_running_reqs=running,
        spec_decoding_stats=SimpleNamespace(num_draft_tokens_per_pos=drafted, num_accepted_tokens_per_pos=accepted),
    )


def draft_lengths(schedule="auto", draft_tokens=2):
    lengths = DraftLengths(DrafterConfig(kind="mtp", draft_tokens=draft_tokens, schedule=schedule), batches=8)
    return lengths, Core(lengths)


async def refused_drafts(lengths, steps=200):
    """Record steps of 8 completions that accept nothing, and wait for the changes that follow."""
    for _ in range(steps):
        lengths.record(stats([8, 8], [0, 0]), None)
        while lengths._changes:
            await asyncio.sleep(0)


async def test_by_default_the_draft_length_is_full_until_costs_are_measured():
    lengths, core = draft_lengths()
    assert lengths.is_measured_at_start
    assert lengths.ranges == [(1, 8, 2)]
    await lengths.measured(COSTS)
    assert core.ranges == lengths.ranges
    assert lengths.status(0).source == "auto"
    assert lengths.ranges[0][2] == 2
    await refused_drafts(lengths)
    assert core.ranges == lengths.ranges == [(1, 8, 0)]
    status = lengths.status(3)
    assert (status.engine, status.changes) == (3, core.changes - 1)  # after the first choice
    assert "1600 drafts" in status.reason
    await lengths.new_drafter()
    assert core.ranges == lengths.ranges
    assert lengths.ranges[0][2] == 2


async def test_a_calibration_is_followed_at_once_and_a_fixed_schedule_never_changes():
    lengths, _ = draft_lengths(calibration())
    assert not lengths.is_measured_at_start
    assert (lengths.status(0).source, lengths.status(0).acceptance_by_position) == ("file", pytest.approx([0.9, 0.8]))
    for schedule, source in (("fixed", "fixed"), ([(1, 8, 2)], "ranges")):
        lengths, _ = draft_lengths(schedule)
        await refused_drafts(lengths)
        assert (lengths.ranges, lengths.status(0).source) == ([(1, 8, 2)], source)
        assert lengths.status(0).reason == "As configured in drafter.schedule."


def engine_with(lengths):
    """An engine's actor that is started, without vLLM."""
    engine = object.__new__(Engine)
    engine.llm, engine.index, engine.lengths, engine.times = SimpleNamespace(), 0, lengths, StepTimes()
    return engine


@pytest.mark.parametrize("schedule", ["auto", [(1, 8, 2)]])
async def test_draft_lengths_that_are_set_are_reported_and_stay(schedule):
    lengths, core = draft_lengths(schedule)
    if schedule == "auto":
        await lengths.measured(COSTS)
    engine = engine_with(lengths)
    await engine.set_draft_lengths([(1, 4, 1), (5, 8, 0)])
    await refused_drafts(lengths)
    told = await engine.schedule()
    assert told.ranges == core.ranges == [(1, 4, 1), (5, 8, 0)]
    assert (told.source, told.reason) == ("ranges", "As set while the engine runs.")


async def test_wrong_draft_lengths_are_refused_by_the_range_and_fixed_ones_by_the_field():
    lengths, core = draft_lengths()
    with pytest.raises(ValueError, match=r"range \[1, 8, 3\] drafts 3 tokens"):
        await lengths.set([(1, 8, 3)])
    fixed, _ = draft_lengths("fixed")
    with pytest.raises(ValueError, match=r"drafter\.schedule"):
        await fixed.set([(1, 8, 1)])
    assert core.ranges == lengths.ranges == [(1, 8, 2)]


async def test_a_measurement_leaves_the_draft_lengths_as_they_were(monkeypatch):
    lengths, core = draft_lengths()
    await lengths.measured(COSTS)
    engine, before, during = engine_with(lengths), lengths.ranges, []

    async def generate(*arguments, **more):
        during.append(core.ranges)
        for _ in range(200):  # the drafts of a measurement change nothing
            lengths.record(stats([8, 8], [0, 0]), None)

    monkeypatch.setattr("rollout_service.engine.measuring._generate", generate)
    await engine.measure(Plan(prompts=[[1]], batch_sizes=[8], draft_lengths=[2, 1, 0], steps=4))
    assert during == [before, [(1, 8, 2)], [(1, 8, 1)], [(1, 8, 0)], [(1, 8, 2)]]
    assert (await engine.schedule()).ranges == core.ranges == before
    monkeypatch.setattr("rollout_service.engine.measuring._generate", failing)
    with pytest.raises(RuntimeError, match="died"):
        await measure(None, StepTimes(), lengths, Plan(prompts=[[1]], batch_sizes=[8], draft_lengths=[0], steps=4))
    assert core.ranges == lengths.ranges == before


async def failing(*_, until=None, **more):
    if until is not None:
        raise RuntimeError("died")


async def test_the_last_of_several_quick_changes_wins():
    lengths, core = draft_lengths([(1, 8, 2)])
    await asyncio.gather(*(lengths.set([(1, 8, k)]) for k in (1, 0, 2, 1)))
    assert core.ranges == lengths.ranges == [(1, 8, 1)]


async def test_the_status_says_why_nothing_is_drafted():
    lengths, _ = draft_lengths()
    await lengths.measured(COSTS)
    await refused_drafts(lengths)
    lengths.record(SimpleNamespace(num_running_reqs=5, spec_decoding_stats=None), None)
    status = lengths.status(0)
    assert (status.batch_size, status.draft_tokens) == (5, 0)
    assert [choice.batch_size for choice in status.choices] == [1, 5, 8]
    now = status.choices[1]
    assert now.tokens_per_second[0] == pytest.approx(5 / COSTS.at(5, 0))
    assert now.tokens_per_second[1] == pytest.approx(5 / COSTS.at(5, 1), rel=0.05)  # almost no draft is accepted
    assert now.threshold == pytest.approx(1.17 * now.tokens_per_second[0])
    assert max(now.tokens_per_second[1:]) < now.threshold
    best = max(now.tokens_per_second[1:]) / now.tokens_per_second[0]
    assert "batch size, 5, nothing is drafted" in status.reason
    assert f"{best:.2f} times as fast as without drafts, and the threshold is 1.17 times" in status.reason


async def test_the_status_says_how_fast_the_draft_length_in_use_is_and_how_fast_it_must_stay():
    lengths, _ = draft_lengths()
    await lengths.measured(COSTS)
    lengths.record(SimpleNamespace(num_running_reqs=1, spec_decoding_stats=None), None)
    status = lengths.status(0)
    now = status.choices[0]
    assert (now.batch_size, now.draft_tokens, status.draft_tokens) == (1, 2, 2)
    assert now.threshold == pytest.approx(1.08 * now.tokens_per_second[0])
    gain = now.tokens_per_second[2] / now.tokens_per_second[0]
    assert f"the draft length is 2, {gain:.2f} times as fast as without drafts" in status.reason


def step(running, generated, drafts=0, drafted=0, prompt=0):
    spec = drafts and SimpleNamespace(
        num_drafts=drafts, num_draft_tokens=drafted, num_draft_tokens_per_pos=[drafts], num_accepted_tokens_per_pos=[0]
    )
    return (
        SimpleNamespace(num_running_reqs=running, spec_decoding_stats=spec or None),
        SimpleNamespace(num_prompt_tokens=prompt, num_generation_tokens=generated),
    )


def test_only_steps_in_which_all_requests_decode_alike_are_counted():
    assert step_kind(*step(4, 4)) == StepKind(4, 0)
    assert step_kind(*step(4, 9, drafts=4, drafted=12)) == StepKind(4, 3)
    assert step_kind(*step(4, 9, drafts=4, drafted=11)) is None  # one draft was cut short
    assert step_kind(*step(4, 9, drafts=3, drafted=9)) is None  # one has just begun
    assert step_kind(*step(4, 4, prompt=20)) is None
    assert step_kind(*step(4, 3)) is None  # one is still in its prompt


def test_a_step_is_timed_when_it_follows_one_of_its_kind():
    times = StepTimes()
    times.record(*step(4, 4))
    times.measured = measured = Measured()
    times.ask(StepKind(4, 0), steps=8)
    for kind in (step(4, 4), step(4, 4), step(4, 5, drafts=4, drafted=4), step(4, 5, drafts=4, drafted=4), step(4, 4)):
        times.record(*kind)
    assert {kind: len(seconds) for kind, seconds in measured.seconds.items()} == {StepKind(4, 0): 1}
    assert measured.drafted == [8]


def test_steps_before_all_prompts_have_arrived_are_not_measured():
    """If these were taken for the first step, that step would be missing, and the engine would not start."""
    times = StepTimes()
    times.measured = measured = Measured()
    times.ask(StepKind(4, 0), steps=1)
    for kind in (step(1, 1, prompt=5), step(1, 1), step(1, 1), step(4, 4, prompt=15), step(4, 4), step(4, 4)):
        times.record(*kind)
    assert list(measured.first) == list(measured.seconds) == [StepKind(4, 0)]


def test_the_first_step_is_timed_from_the_arrival_of_its_prompts():
    times = StepTimes()
    times.measured = Measured()
    times.ask(StepKind(4, 0), steps=8)
    times.arrival = 0.0
    for kind in (step(4, 4, prompt=20), step(4, 4), step(4, 4)):
        times.record(*kind)
    assert [len(seconds) for seconds in times.measured.first.values()] == [1]
    assert times.measured.first[StepKind(4, 0)][0] > times.measured.seconds[StepKind(4, 0)][0]


def test_a_measurement_ends_after_the_number_of_steps_that_was_asked_for():
    times = StepTimes()
    times.measured = Measured()
    times.ask(StepKind(4, 0), steps=2)
    seen = []
    for kind in (step(4, 4, prompt=20), step(4, 4), step(4, 4), step(3, 3), step(3, 3), step(4, 4), step(4, 4)):
        times.record(*kind)
        seen.append(times.enough.is_set())
    assert seen == [False] * 6 + [True]
    times.ask(StepKind(4, 1), steps=2)
    assert not times.enough.is_set()


def gpu_lengths(schedule="auto", kind="mtp", draft_tokens=2):
    lengths = DraftLengths(DrafterConfig(kind=kind, draft_tokens=draft_tokens, schedule=schedule), 8, "v2")
    return lengths, Core(lengths)


@pytest.mark.parametrize("schedule", ["auto", [(1, 8, 1)], calibration()], ids=["auto", "ranges", "file"])
async def test_a_gpu_engine_starts_with_every_length_and_then_takes_its_schedule(schedule):
    """vLLM captures CUDA graphs for the lengths of the schedule that it starts with."""
    lengths, core = gpu_lengths(schedule)
    wanted = draft_lengths(schedule)[0].ranges
    assert {length for _, _, length in lengths.ranges} == {0, 1, 2}
    assert wanted != lengths.ranges
    await lengths.started(core)
    assert core.ranges == lengths.ranges == wanted
    cpu, core = draft_lengths(schedule)
    await cpu.started(core)
    assert core.changes == 0


async def test_a_fixed_schedule_starts_as_it_is_on_a_gpu():
    lengths, core = gpu_lengths("fixed")
    await lengths.started(core)
    assert (lengths.ranges, core.changes) == ([(1, 8, 2)], 0)


@pytest.mark.parametrize(("runner", "measured"), [("v1", False), ("v2", True)])
def test_n_grams_are_measured_where_every_step_has_drafts(runner, measured):
    assert DraftLengths(DrafterConfig(kind="ngram"), 8, runner).is_measured_at_start == measured
    assert DraftLengths(DrafterConfig(kind="mtp"), 8, runner).is_measured_at_start
    assert not DraftLengths(DrafterConfig(), 8, runner).is_measured_at_start


async def test_the_status_says_where_the_drafter_runs_without_drafts():
    for made, says in ((draft_lengths, False), (gpu_lengths, True)):
        lengths, core = made()
        await lengths.started(core)
        await lengths.measured(COSTS)
        assert ("still runs its first forward pass" in lengths.status(0).reason) == says


@pytest.mark.parametrize("seconds", [0.002, 0.01])
@pytest.mark.parametrize("spread", [0.0, 0.03, 0.05])
def test_steps_are_measured_until_the_cost_is_known_to_one_percent(seconds, spread):
    random, costs, counts = np.random.default_rng(0), [], []
    for _ in range(200):
        times = StepTimes()
        times.measured = Measured()
        times.ask(StepKind(4, 0), steps=3, precisely=True)
        of_kind = times.measured.seconds[StepKind(4, 0)]
        while not (of_kind and times._are_enough(of_kind)):
            of_kind.append(seconds * random.normal(1.0, spread))
        costs.append(standard_cost(of_kind) / seconds)
        counts.append(len(of_kind))
    assert np.std(costs) < 0.014  # a spread of 5 % over 3 steps, as before, gives 0.029
    assert max(counts) * seconds <= LONGEST + seconds
    assert spread or set(counts) == {12}


def standard_cost(seconds):
    measured = Measured()
    measured.seconds[StepKind(1, 0)] += seconds
    measured.first[StepKind(1, 0)] += [1.0]
    return measured.costs([1], draft_tokens=0).seconds[0][0]


def test_the_standard_error_is_that_of_the_cost():
    random = np.random.default_rng(0)
    samples = [random.normal(1.0, 0.1, size=20) + (random.random(20) < 0.1) for _ in range(2000)]
    costs = [standard_cost(list(sample)) for sample in samples]
    assert np.mean([standard_error(sample) for sample in samples]) == pytest.approx(np.std(costs), rel=0.15)


def test_rounds_are_combined_and_batch_sizes_that_were_never_reached_are_left_out():
    measured = Measured()
    for round in range(2):
        part = Measured(drafted=[10], accepted=[8])
        part.seconds[StepKind(1, 0)] += [0.02, 0.02, 0.02, 0.9][round::2]
        part.seconds[StepKind(1, 1)] += [0.03]
        part.seconds[StepKind(64, 0)] += [0.1]
        for kind in (StepKind(1, 0), StepKind(1, 1), StepKind(64, 0)):
            part.first[kind] += [0.05]
        measured.add(part)
    costs = measured.costs([1, 64], draft_tokens=1)
    assert costs.batch_sizes == [1]
    assert [row[0] for row in costs.seconds] == pytest.approx([0.02, 0.03])
    assert measured.acceptance == [0.8]


@pytest.mark.parametrize("seen", [[7.9, 0.0, 1.9], [3.2, 6.5, 0.0, 3.4, 3.2, 3.3, 3.3, 30.0]])
def test_a_step_that_is_seen_late_does_not_make_the_next_one_look_cheap(seen):
    """Milliseconds of steps that took about 3.3 in a starting engine. The median of the first three is 1.9."""
    measured = Measured()
    measured.seconds[StepKind(1, 0)] += seen
    measured.first[StepKind(1, 0)] += [10.0]
    assert measured.costs([1], draft_tokens=0).seconds[0] == [pytest.approx(3.3, rel=0.05)]


def test_a_slow_minute_does_not_change_the_ratio_of_costs():
    turns = Turns(plain=[], drafting=[], acceptance=[])
    for slow in ({}, {8: 1.5}, {1: 1.2, 8: 1.2}):
        plain, drafting = Measured(), Measured()
        for batch, seconds in ((1, 0.02), (8, 0.04)):
            for measured, kind, cost in ((plain, 0, 1.0), (drafting, 0, 1.02), (drafting, 1, 1.6)):
                measured.seconds[StepKind(batch, kind)] += [cost * seconds * slow.get(batch, 1.0)] * 3
                measured.first[StepKind(batch, kind)] += [cost * 3 * seconds * slow.get(batch, 1.0)]
        turns.plain.append(plain)
        turns.drafting.append(drafting)
    baseline, costs = turns.costs([1, 8, 64], draft_tokens=1)
    assert costs.batch_sizes == baseline.batch_sizes == [1, 8]
    assert baseline.seconds == [pytest.approx([0.02, 0.048])]
    for of_both, plain in ((costs.seconds, baseline.seconds), (costs.first, baseline.first)):
        assert np.divide(of_both, plain) == pytest.approx(np.array([[1.02, 1.02], [1.6, 1.6]]))


def test_each_cost_is_the_lower_of_two_passes():
    """On a busy machine, a single pass makes drafts look too slow: 8 completions would draft one token only."""
    busy = StepCosts(batch_sizes=[1, 8], seconds=[[0.02, 0.04], [0.05, 0.12]], first=[[0.1, 0.1], [0.1, 0.9]])
    quiet = StepCosts(batch_sizes=[1, 4, 8], seconds=[[0.03, 0.1, 0.05], [0.022, 0.1, 0.05]], first=[[0.2] * 3] * 2)
    costs = fastest([busy, quiet])
    assert costs.batch_sizes == [1, 8]
    assert costs.seconds == [[0.02, 0.04], [0.022, 0.05]]
    assert costs.first == [[0.1, 0.1], [0.1, 0.2]]


async def test_an_engine_on_a_gpu_switches_its_verification_and_refuses_another_draft_sampling():
    engine, called = object.__new__(Engine), []

    async def collective_rpc(method, args=()):
        if method != "running":
            called.append((method, *args))
        return [{"verification": called[-1][-1]}]

    engine.config = ServiceConfig(model="m", drafter={"kind": "mtp"})
    engine.llm = SimpleNamespace(collective_rpc=collective_rpc)
    engine.runner = "v2"
    await engine.set_verification("block")
    await engine.set_draft_sampling("probabilistic")
    with pytest.raises(ValueError, match="draft_sampling: an engine with vLLM's V2 model runner"):
        await engine.set_draft_sampling("greedy")
    assert called == [("set_verification", "block")]
    assert engine.ran == {"verification": "block"}
    engine.runner = "v1"
    await engine.set_draft_sampling("greedy")
    assert called[1:] == [("set_draft_sampling", "greedy")]


@pytest.mark.parametrize(("kind", "says"), [("none", "drafts nothing"), ("ngram", "only what it finds")])
def test_a_drafter_whose_draft_length_cannot_be_chosen_is_not_calibrated(kind, says):
    prompts = Path(__file__).parents[2] / "deploy" / "demo" / "prompts.jsonl"
    with pytest.raises(ValueError, match=says):
        CalibrateConfig(model="m", prompts=prompts, drafter={"kind": kind})

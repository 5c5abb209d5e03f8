"""Prompts that leave no room for a response: no epoch has them, in either mode, and a late one is named."""

from collections import Counter

import pytest
import rl_toys as toys
from test_rl_asynchronous import QueueService, config, loop, pool, trained_on  # noqa: F401  (pool is a fixture)

from rl_loop.config import TrainConfig
from rl_loop.learner.local_learner import LocalLearner
from rl_loop.prompt_lengths import FittingTask, PromptLengths
from rl_loop.run.checkpoint import checkpoints
from rl_loop.tasks import TaskError, TaskProblem, make_task

LONGEST = 20


class Mixed(toys.CountLetterA):
    """Ten problems. Those in `overlong` are longer than LONGEST tokens."""

    def __init__(self, overlong=(3, 7)):
        self.overlong = overlong

    def prompt(self, split, index):
        place = index % 10
        prompt = "1" * (LONGEST + 1) if place in self.overlong else f"{place}+1="
        return TaskProblem(entry={"place": place}, prompt=prompt, origin=f"{split} {place}")


def fitting(overlong, task=None):
    task = task or Mixed()
    return FittingTask(task, PromptLengths(task, toys.character_tokenizer()), LONGEST, overlong)


def test_every_epoch_has_each_fitting_prompt_once_and_no_other():
    task = fitting("skip")
    drawn = [task.prompt("train", index).entry["place"] for index in range(24)]
    assert drawn == [0, 1, 2, 4, 5, 6, 8, 9] * 3
    assert task.skipped == {"train 3", "train 7"}
    assert task.prompt("held_out", 3).entry["place"] == 4


def test_the_problem_of_an_index_does_not_depend_on_earlier_draws():
    late = fitting("skip").prompt("train", 19)
    task = fitting("skip")
    assert [task.prompt("train", index) for index in range(20)][-1] == late


def test_a_prompt_is_measured_once(monkeypatch):
    tokenizer, asked = toys.character_tokenizer(), []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text, **how: asked.append(text) or encode(text, **how))
    task = FittingTask(Mixed(), PromptLengths(Mixed(), tokenizer), LONGEST, "skip")
    for index in range(40):
        task.prompt("train", index)
    assert len(asked) == 10


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_runs_of_both_modes_skip_overlong_prompts(mode, tmp_path, pool):  # noqa: F811
    task, changes = fitting("skip"), {"steps": 4, "prompts_per_step": 4}
    asked = Counter()

    class Source(toys.SamplingSource):
        def _group(self, request):
            asked[request.prompt] += 1
            return super()._group(request)

    if mode == "sync":
        settings = toys.config(tmp_path, **changes)
        running = toys.loop(settings, LocalLearner(settings, toys.llama()), Source(toys.llama()), task=task)
        running.run()
    else:
        service = QueueService()
        service.source = Source(toys.llama())
        running = loop(config(tmp_path, **changes), service, pool)
        running.task = task
        running.run()
        service.close()
        assert sum(trained_on(tmp_path).values()) == 16
    assert asked == {f"{place}+1=": 2 for place in range(10) if place not in (3, 7)}


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_an_overlong_prompt_that_is_drawn_late_is_named_and_can_be_skipped(mode, tmp_path, pool):  # noqa: F811
    """A generated dataset is measured only as far as the run is expected to draw."""
    settings = (toys.config if mode == "sync" else config)(tmp_path, steps=3, prompts_per_step=3)
    service = QueueService()

    def run(overlong):
        task = fitting(overlong, Mixed(overlong=(7,)))
        if mode == "sync":
            running = toys.loop(settings, LocalLearner(settings, toys.llama()), service.source, task=task)
        else:
            running = loop(settings, service, pool)
            running.task = task
        running.run()
        return running

    with pytest.raises(TaskError, match=r"task\.overlong: train 7 has 21 tokens, but only 20 fit; continue with --res"):
        run("refuse")
    service.owner = None  # the command releases the service
    assert run("skip").state.step == 3
    assert checkpoints(tmp_path)
    service.close()


def test_a_generated_dataset_is_measured_as_far_as_the_run_draws(tmp_path):
    settings = TrainConfig(model="toy", steps=3, prompts_per_step=5, evaluation_prompts=4)
    measured = PromptLengths(make_task(settings.task), toys.character_tokenizer()).measure(settings)
    assert {split: len(of_split) for split, of_split in measured.items()} == {"train": 15, "held_out": 4}

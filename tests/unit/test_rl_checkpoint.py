"""Checkpoints: a resumed run on recorded rollouts equals an uninterrupted one bit for bit."""

import random
import shutil
import signal

import numpy as np
import pytest
import rl_toys as toys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rl_loop.checkpoint import checkpoints, restore_checkpoint
from rl_loop.interruption import Interrupted
from rl_loop.learner import Learner, load_policy
from rl_loop.sources import Recorder, ReplaySource

STEPS, CUT = 5, 3


class CutOff(ReplaySource):
    """A signal comes in the generation of the step after CUT, when its first group has arrived."""

    def rollouts(self, batch, requests):
        for group in super().rollouts(batch, requests):
            yield group
            if batch == f"train-{CUT + 1:06d}":
                raise Interrupted(signal.SIGINT)


def optimiser_state(learner):
    return [learner.optimiser.state[parameter] for parameter in learner.policy.parameters()]


def resumed(settings):
    """As `training.make_learner` does it."""
    latest = checkpoints(settings.output)[-1]
    learner = Learner(settings, load_policy(latest))
    return learner, restore_checkpoint(latest, learner)


@pytest.mark.parametrize("model", [toys.llama, toys.qwen3_next])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(model, tmp_path):
    changes = {
        "steps": STEPS,
        "prompts_per_step": 2,
        "completions": 3,
        "minibatches": 2,
        "epochs": 2,
        "evaluate_every": 2,
        "evaluation_prompts": 2,
        "warmup_steps": 4,
        "keep_checkpoints": 9,
        "checkpoint_every": 0,
    }
    recording = tmp_path / "recording"
    whole = toys.config(tmp_path / "whole", **changes)
    source = Recorder(toys.SamplingSource(toys.llama()), recording)
    if model is toys.qwen3_next:  # the source's policy need not be the one that trains
        source.publish = lambda tensors, version: version + 1
    uninterrupted = toys.loop(whole, Learner(whole, model()), source)
    uninterrupted.run()

    settings = toys.config(tmp_path / "cut", **changes)
    cut = toys.loop(settings, Learner(settings, model()), CutOff(recording))
    with pytest.raises(Interrupted):
        cut.run()
    cut.save()
    torch.rand(1), random.random(), np.random.rand()
    learner, state = resumed(settings)
    assert (state.step, state.position) == (CUT, CUT * 2)
    loop = toys.loop(settings, learner, ReplaySource(recording), state)
    loop.run()

    assert loop.state == uninterrupted.state
    expected = uninterrupted.learner.policy.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in learner.policy.state_dict().items())
    for mine, theirs in zip(optimiser_state(learner), optimiser_state(uninterrupted.learner), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)

    timeless = {"exposed_generation", "learner_idle", "stages", "seconds", "tokens_per_second"}
    for log in ("steps", "evaluations"):
        mine, theirs = getattr(loop.reporter.log, log), getattr(uninterrupted.reporter.log, log)
        assert [m.model_dump(exclude=timeless) for m in mine] == [m.model_dump(exclude=timeless) for m in theirs]
    mine, theirs = (checkpoints(output)[-1] for output in (settings.output, whole.output))
    for file in ("model.safetensors", "trainer/optimiser.safetensors", "trainer/generators.safetensors"):
        assert (mine / file).read_bytes() == (theirs / file).read_bytes()


def test_generators_go_on_where_they_were(tmp_path):
    settings = toys.config(tmp_path, steps=1)
    toys.loop(settings, Learner(settings, toys.llama()), toys.SamplingSource(toys.llama())).run()
    restore = lambda: restore_checkpoint(checkpoints(tmp_path)[-1], Learner(settings, toys.llama()))  # noqa: E731
    draw = lambda: (torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist())  # noqa: E731
    restore()
    first = draw()
    draw()
    restore()
    assert draw() == first


def test_a_checkpoint_is_a_hugging_face_model(tmp_path):
    settings = toys.config(tmp_path, steps=1)
    loop = toys.loop(settings, Learner(settings, toys.llama()), toys.SamplingSource(toys.llama()))
    loop.run()
    folder = checkpoints(tmp_path)[-1]
    model = AutoModelForCausalLM.from_pretrained(folder)
    trained = loop.learner.policy.state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(folder).encode("1+2") == toys.character_tokenizer().encode("1+2")
    assert not [file for file in folder.rglob("*") if file.suffix in (".pt", ".bin", ".pkl")]


def test_the_last_ones_are_kept_and_half_written_ones_ignored(tmp_path):
    settings = toys.config(tmp_path, steps=5, checkpoint_every=1, keep_checkpoints=2)
    loop = toys.loop(settings, Learner(settings, toys.llama()), toys.SamplingSource(toys.llama()))
    shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
    (tmp_path / "checkpoints" / ".step-000004" / "trainer").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step-000009").mkdir()
    loop.run()
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-000004", "step-000005"]

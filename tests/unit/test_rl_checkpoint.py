"""Checkpoints: a resumed run on recorded rollouts equals an uninterrupted one bit for bit."""

import errno
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import rl_toys as toys
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from drafters.files.checkpoint_folder import checkpoint_names, read_config, read_tensors
from drafters.files.disk_space import NoRoom
from drafters.kinds.mtp import is_mtp
from drafters.learners.factory import load_learner
from drafters.learners.mtp_head import MTPHead
from drafters.registry import DrafterConfig, make_drafter
from rl_loop.learner.local_learner import LocalLearner, load_policy
from rl_loop.loops.interruption import Interrupted
from rl_loop.loops.recording import Recorder, Recording, ReplaySource
from rl_loop.run.checkpoint import (
    _restore_torch_generators,
    _torch_generators,
    checkpoint_bytes,
    checkpoint_folder,
    checkpoints,
    prune_checkpoints,
    restore_checkpoint,
)
from rl_loop.training import begin_state, make_learners

STEPS, CUT = 5, 3


class CutOff(ReplaySource):
    """A signal comes during the generation of the step after CUT, when its first group has arrived."""

    def rollouts(self, batch, requests):
        for group in super().rollouts(batch, requests):
            yield group
            if batch == f"train-{CUT + 1:06d}":
                raise Interrupted(signal.SIGINT)


def optimiser_state(learner):
    return [learner.optimiser.state[parameter] for parameter in learner.policy.parameters()]


def resumed(settings, model=toys.llama):
    """The learners as `training.make_learners` makes them."""
    latest = checkpoints(settings.output)[-1]
    learner = LocalLearner(settings, model())
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
    source = Recorder(toys.SamplingSource(toys.llama()), Recording(recording))
    if model is toys.qwen3_next:  # the source's policy may differ from the one that trains
        source.source.publish = lambda of, export, version, **_: version + 1
    uninterrupted = toys.loop(whole, LocalLearner(whole, model()), source)
    uninterrupted.run()

    settings = toys.config(tmp_path / "cut", **changes)
    cut = toys.loop(settings, LocalLearner(settings, model()), CutOff(recording))
    with pytest.raises(Interrupted):
        cut.run()
    cut.save()
    torch.rand(1), random.random(), np.random.rand()
    learner, state = resumed(settings, model)
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
    toys.loop(settings, LocalLearner(settings, toys.llama()), toys.SamplingSource(toys.llama())).run()
    restore = lambda: restore_checkpoint(checkpoints(tmp_path)[-1], LocalLearner(settings, toys.llama()))  # noqa: E731
    draw = lambda: (torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist())  # noqa: E731
    restore()
    first = draw()
    draw()
    restore()
    assert draw() == first


def test_the_generator_of_the_learners_gpu_is_saved_and_no_other_gpu_is_touched(monkeypatch):
    states, touched = {1: torch.full((16,), 7, dtype=torch.uint8)}, []

    def get(device):
        touched.append(device)
        return states[torch.device(device).index]

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr("torch.cuda.get_rng_state", get)
    monkeypatch.setattr("torch.cuda.set_rng_state", lambda state, device: touched.append((state.tolist(), device)))
    gpu = torch.device("cuda:1")
    saved = _torch_generators(gpu)
    assert saved.keys() == {"cpu", "cuda"}
    assert touched == [gpu]
    _restore_torch_generators(saved, torch.device("cuda:2"))
    assert touched[1:] == [([7] * 16, torch.device("cuda:2"))], "a run may go on with another GPU"
    _restore_torch_generators(saved, torch.device("cpu"))
    assert _torch_generators(torch.device("cpu")).keys() == {"cpu"}
    assert len(touched) == 2


def test_a_checkpoint_is_a_hugging_face_model(tmp_path):
    settings = toys.config(tmp_path, steps=1)
    loop = toys.loop(settings, LocalLearner(settings, toys.llama()), toys.SamplingSource(toys.llama()))
    loop.run()
    folder = checkpoints(tmp_path)[-1]
    model = AutoModelForCausalLM.from_pretrained(folder)
    trained = loop.learner.policy.state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(folder).encode("1+2") == toys.character_tokenizer().encode("1+2")
    assert not [file for file in folder.rglob("*") if file.suffix in (".pt", ".bin", ".pkl")]


def full_disk_at(step, name, monkeypatch):
    """From that step on, files of this name find no room, with the errors of transformers and safetensors."""
    write = save_file

    def save(tensors, file, **named):
        if name in str(file) and f"step-{step:06d}" in str(file):
            Path(file).write_bytes(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        write(tensors, file, **named)

    for module in ("rl_loop.run.checkpoint", "rl_loop.learner.local_learner", "transformers.modeling_utils"):
        where = "safe_save_file" if module.startswith("transformers") else "save_file"
        monkeypatch.setattr(f"{module}.{where}", save)
    if name == "state.json":
        text = Path.write_text

        def write_text(path, *arguments, **named):
            if path.name == name and f"step-{step:06d}" in str(path):
                raise OSError(errno.ENOSPC, "No space left on device")
            return text(path, *arguments, **named)

        monkeypatch.setattr(Path, "write_text", write_text)


@pytest.mark.parametrize("name", ["model.safetensors", "optimiser.safetensors", "state.json"])
def test_a_full_disk_leaves_the_earlier_checkpoints_and_says_how_much_room_is_needed(name, tmp_path, monkeypatch):
    settings = toys.config(tmp_path, steps=4, checkpoint_every=1, keep_checkpoints=1)
    learner = LocalLearner(settings, toys.llama())
    with monkeypatch.context() as full:
        full_disk_at(3, name, full)
        needed = (
            rf"the checkpoint of step 3: it takes about [\d.]+ MiB, and {tmp_path / 'checkpoints'} has [\d.,]+ MiB left"
        )
        with pytest.raises(NoRoom, match=needed):
            toys.loop(settings, learner, toys.SamplingSource(toys.llama())).run()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"], "complete checkpoints only"
    learner, state = resumed(settings)
    toys.loop(settings, learner, toys.SamplingSource(toys.llama()), state).run()
    whole = toys.config(tmp_path / "whole", steps=4)
    toys.loop(whole, LocalLearner(whole, toys.llama()), toys.SamplingSource(toys.llama())).run()
    mine, theirs = (load_file(checkpoints(output)[-1] / "model.safetensors") for output in (tmp_path, whole.output))
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_the_size_of_a_checkpoint_is_predicted(tmp_path):
    settings = toys.config(tmp_path, steps=1)
    learner = LocalLearner(settings, toys.llama())
    toys.loop(settings, learner, toys.SamplingSource(toys.llama())).run()
    written = sum(file.stat().st_size for file in checkpoints(tmp_path)[-1].rglob("*.safetensors"))
    assert checkpoint_bytes(learner, None) == pytest.approx(written, rel=0.1)


def test_a_checkpoint_whose_removal_was_cut_off_is_not_visible(tmp_path, monkeypatch):
    for step in range(3):
        folder = checkpoint_folder(tmp_path, step)
        folder.mkdir(parents=True)
        (folder / "model.safetensors").touch()

    def killed(folder):
        os.remove(folder / "model.safetensors")
        raise Interrupted(signal.SIGKILL)

    with monkeypatch.context() as death:
        death.setattr("rl_loop.run.checkpoint.shutil.rmtree", killed)
        with pytest.raises(Interrupted):
            prune_checkpoints(tmp_path, keep=1)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-000002"]
    prune_checkpoints(tmp_path, keep=1)
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


@pytest.fixture
def with_head(tmp_path):
    """The folder of a policy with an MTP head."""
    folder, policy = tmp_path / "policy", toys.qwen3_next()
    policy.config.num_nextn_predict_layers = 1
    policy.save_pretrained(folder)
    torch.manual_seed(7)
    MTPHead.from_policy(policy).write(folder, folder, torch.bfloat16)
    return folder


def trained_as_by_the_command(settings):
    """A run of that policy, new or resumed."""
    state, (learner, _) = begin_state(settings), make_learners(settings)
    source = toys.SamplingSource(toys.llama())
    source.publish = lambda of, export, version, **_: version + 1
    toys.loop(settings, learner, source, state).run()


@pytest.mark.parametrize("one_file", [False, True])
def test_checkpoints_carry_a_head_that_is_not_trained(one_file, with_head, tmp_path):
    head = {name: tensor for name, tensor in read_tensors(with_head).items() if is_mtp(name)}
    if one_file:
        save_file(read_tensors(with_head), with_head / "model.safetensors", metadata={"format": "pt"})
        for name in ("mtp.safetensors", "model.safetensors.index.json"):
            (with_head / name).unlink()
    settings = toys.config(tmp_path / "run", model=str(with_head), steps=1, keep_checkpoints=1)
    trained_as_by_the_command(settings)
    trained_as_by_the_command(settings.model_copy(update={"steps": 2, "resume": True}))
    (latest,) = checkpoints(settings.output)
    found = read_tensors(latest)
    assert all(torch.equal(found[name], tensor) for name, tensor in head.items())
    assert any(not torch.equal(found[name], t) for name, t in read_tensors(with_head).items() if not is_mtp(name))
    drafter = make_drafter(DrafterConfig(kind="mtp"))
    drafter.check(read_config(latest), None, checkpoint_names(latest))
    assert load_learner("mtp", latest, load_policy(latest)) is not None


def test_checkpoints_of_a_policy_without_a_head_have_none(tmp_path):
    toys.llama().save_pretrained(tmp_path / "policy")
    settings = toys.config(tmp_path / "run", model=str(tmp_path / "policy"), steps=1)
    trained_as_by_the_command(settings)
    latest = checkpoints(settings.output)[-1]
    assert [file.name for file in latest.glob("*.safetensors")] == ["model.safetensors"]


def test_the_last_ones_are_kept_and_half_written_ones_ignored(tmp_path):
    settings = toys.config(tmp_path, steps=5, checkpoint_every=1, keep_checkpoints=2)
    loop = toys.loop(settings, LocalLearner(settings, toys.llama()), toys.SamplingSource(toys.llama()))
    shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
    (tmp_path / "checkpoints" / ".step-000004" / "trainer").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step-000009").mkdir()
    loop.run()
    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == ["step-000004", "step-000005"]

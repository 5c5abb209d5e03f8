"""Formats of checkpoints and recordings: earlier ones are read, and others are refused in one line."""

import json

import pytest
import rl_toys as toys

from drafters.files.stored_format import OtherFormat
from rl_loop.learner.local_learner import LocalLearner
from rl_loop.loops.recording import FORMAT, Recorder, Recording, ReplaySource
from rl_loop.preflight import PreflightError
from rl_loop.run.checkpoint import checkpoints, read_state, restore_checkpoint
from rl_loop.training import begin_state


@pytest.fixture
def settings(tmp_path):
    """The output of a finished run, with a recording of its rollouts."""
    settings = toys.config(tmp_path / "run", steps=1)
    source = Recorder(toys.SamplingSource(toys.llama()), Recording(tmp_path / "run" / "rollouts"))
    toys.loop(settings, LocalLearner(settings, toys.llama()), source).run()
    return settings


def rewrite(file, **changes):
    """Change fields of a JSON file. None removes a field."""
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def test_a_checkpoint_from_before_formats_had_numbers_is_read(settings):
    latest = checkpoints(settings.output)[-1]
    assert json.loads((latest / "trainer" / "state.json").read_text())["format"] == 1
    rewrite(latest / "trainer" / "state.json", format=None)
    assert restore_checkpoint(latest, LocalLearner(settings, toys.llama())).step == 1


@pytest.mark.parametrize(
    ("found", "why"), [(2, "newer version; update this one"), (0, "older version"), ("x", "older")]
)
def test_a_checkpoint_of_another_format_is_refused_and_named(found, why, settings):
    latest = checkpoints(settings.output)[-1]
    file = latest / "trainer" / "state.json"
    rewrite(file, format=found)
    with pytest.raises(OtherFormat, match=f"{file} has format {found}, and this version reads format 1: "):
        read_state(latest)
    with pytest.raises(PreflightError, match=why):
        begin_state(settings.model_copy(update={"resume": True}))


def test_a_recording_from_before_formats_had_numbers_is_replayed(settings, tmp_path):
    recording = settings.output / "rollouts"
    (recording / "recording.json").unlink()
    replayed = toys.config(tmp_path / "replayed", steps=1)
    toys.loop(replayed, LocalLearner(replayed, toys.llama()), ReplaySource(recording)).run()
    mine, theirs = (checkpoints(output)[-1] / "model.safetensors" for output in (replayed.output, settings.output))
    assert mine.read_bytes() == theirs.read_bytes()


def test_a_recording_of_another_format_is_neither_replayed_nor_added_to(settings):
    recording = settings.output / "rollouts"
    rewrite(recording / "recording.json", format=FORMAT + 1)
    for use in (ReplaySource, Recording):
        with pytest.raises(OtherFormat, match=r"recording\.json has format 2, and .* reads format 1: .*newer"):
            use(recording)

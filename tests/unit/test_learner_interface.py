"""Learner interface: a learner that can be reached only through the interface trains in both loops."""

import pytest
import rl_toys as toys
import torch
from safetensors.torch import load_file
from test_online_drafter import checkpoint
from test_rl_asynchronous import config, loop, pool, service  # noqa: F401  (fixtures)

from rl_loop.learner.local_learner import LocalLearner
from rl_loop.learner.online_drafter import OnlineDrafter
from rl_loop.learner.policy_learner import PolicyLearner
from rl_loop.run.checkpoint import checkpoints, restore_checkpoint


class SealedLearner(PolicyLearner):
    """A learner that can be reached only by the methods of the interface, as if it were in another process."""

    def __init__(self, settings):
        super().__init__(settings)
        learner = LocalLearner(settings, toys.llama())
        self.call = lambda name, *arguments: getattr(learner, name)(*arguments)

    def logprobs(self, rollouts, reader=None):
        return self.call("logprobs", rollouts, reader)

    def reference_logprobs(self, rollouts):
        return self.call("reference_logprobs", rollouts)

    def routing(self):
        return self.call("routing")

    def forward_backward(self, examples):
        return self.call("forward_backward", examples)

    def optimiser_step(self, learning_rate):
        return self.call("optimiser_step", learning_rate)

    def export(self, dtype):
        return self.call("export", dtype)

    def save(self, folder):
        self.call("save", folder)

    def load(self, folder):
        self.call("load", folder)

    def checkpoint_bytes(self):
        return self.call("checkpoint_bytes")


class Source(toys.SamplingSource):
    def publish(self, of, export, version, *, is_new=True):
        return super().publish(of, export, version) if of == "policy" else version + 1


def trained(settings, make_learner, latest=None):
    """The latest checkpoint of a synchronous run with a drafter."""
    learner, drafter = make_learner(settings), OnlineDrafter.load(settings, toys.llama())
    state = None if latest is None else restore_checkpoint(latest, learner, drafter)
    toys.loop(settings, learner, Source(toys.llama()), state, drafter=drafter).run()
    return checkpoints(settings.output)[-1]


def test_a_sealed_learner_trains_saves_and_resumes_as_a_local_one_does(tmp_path):
    head = checkpoint("eagle3", toys.llama(), tmp_path / "start")
    changes = {
        "online_drafter": {"kind": "eagle3", "model": str(head)}, "minibatches": 2, "epochs": 2, "warmup_steps": 3,
        "evaluate_every": 1,
    }  # fmt: skip
    local = trained(toys.config(tmp_path / "local", steps=3, **changes), lambda c: LocalLearner(c, toys.llama()))
    half = trained(toys.config(tmp_path / "sealed", steps=2, **changes), SealedLearner)
    sealed = trained(toys.config(tmp_path / "sealed", steps=3, **changes), SealedLearner, half)
    for file in ("model.safetensors", "trainer/optimiser.safetensors", "trainer/drafter.safetensors"):
        assert (sealed / file).read_bytes() == (local / file).read_bytes()


def test_a_sealed_learner_trains_in_the_asynchronous_loop(tmp_path, service, pool):  # noqa: F811
    settings = config(tmp_path, steps=3, evaluate_every=3)
    running = loop(settings, service, pool, SealedLearner(settings))
    running.run()
    assert service.versions[-1] == 4, "the final evaluation waits for the last policy"
    pushed, saved = service.source.model.state_dict(), load_file(checkpoints(tmp_path)[-1] / "model.safetensors")
    assert all(torch.equal(pushed[name], tensor) for name, tensor in saved.items())
    assert any(not torch.equal(saved[name], t) for name, t in toys.llama().state_dict().items())


def test_loading_puts_weights_and_optimiser_back(tmp_path):
    settings = toys.config(tmp_path, steps=1)
    learner = LocalLearner(settings, toys.llama())
    toys.loop(settings, learner, toys.SamplingSource(toys.llama())).run()
    first, latest = checkpoints(tmp_path)
    saved = {name: t.clone() for name, t in learner.export(torch.float32).items()}
    learner.load(first)
    assert all(torch.equal(t, toys.llama().state_dict()[name]) for name, t in learner.export(torch.float32).items())
    assert not learner.optimiser.state, "the update was undone completely"
    learner.load(latest)
    assert all(torch.equal(t, saved[name]) for name, t in learner.export(torch.float32).items())
    assert learner.optimiser.state


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    settings = toys.config(tmp_path, steps=1)
    toys.loop(settings, LocalLearner(settings, toys.llama()), toys.SamplingSource(toys.llama())).run()
    with pytest.raises(RuntimeError, match="state_dict"):
        LocalLearner(settings, toys.qwen3_next()).load(checkpoints(tmp_path)[-1])

"""Online drafter training: the policy does not change; the drafter learns, follows its rule, is pushed and resumed."""

import json
import shutil
import signal

import pytest
import rl_toys as toys
import torch
from safetensors.torch import load_file, save_file
from test_rl_asynchronous import QueueService
from test_rl_asynchronous import loop as asynchronous_loop

from drafters.learners.eagle3_head import Eagle3Head
from drafters.learners.factory import load_learner
from drafters.learners.mtp_head import MTPHead
from drafters.training.config import OnlineTraining
from drafters.training.online import UpdateRule
from rl_loop.learner.local_learner import LocalLearner, load_policy
from rl_loop.learner.online_drafter import OnlineDrafter
from rl_loop.loops.interruption import Interrupted
from rl_loop.loops.ownership import Ownership
from rl_loop.loops.recording import Recorder, Recording, ReplaySource
from rl_loop.reports.drafter_plot import plot_acceptance, pushes
from rl_loop.run.checkpoint import checkpoints, restore_checkpoint
from rl_loop.tasks.rewards_pool import RewardsPool
from rl_loop.training import begin_state, make_learners
from rollout_service.client import RolloutError, tensors_checksum
from rollout_service.protocol import ErrorBody, WeightsStatus, WeightStatus

POLICIES = {"llama": toys.llama, "qwen3_next": toys.qwen3_next}
PAIRS = [("llama", "eagle3"), ("llama", "draft_model"), ("qwen3_next", "mtp"), ("qwen3_next", "eagle3")]


class Source(toys.SamplingSource):
    """A toy service with a drafter. It keeps what is pushed, and reports a given acceptance."""

    def __init__(self, model, acceptance=None):
        super().__init__(model)
        self.pushed, self.acceptance = [], acceptance or (lambda version: [0, 1, 1])

    def publish(self, of, export, version, *, is_new=True):
        """Only the drafter is kept: these tests do not change the policy."""
        if of == "policy":
            self.version = max(version, self.version) + 1
            return self.version
        self.pushed.append({name: t.clone() for name, t in export(torch.float32).items()})
        return len(self.pushed)

    def _group(self, request):
        group = super()._group(request)
        histogram = self.acceptance(self.version)
        accepted = [accepted for accepted, count in enumerate(histogram) for _ in range(count)]
        for completion in group.completions:
            completion.speculation = completion.speculation.model_copy(update={
                "drafter_version": len(self.pushed), "draft_steps": len(accepted), "drafted": 2 * len(accepted),
                "accepted": sum(accepted), "accepted_histogram": histogram,
                "steps": [(0, 0)] + [(2, a) for a in accepted],
            })  # fmt: skip
        return group


def settings(output, kind, folder, training=None, **changes):
    fields = {"learning_rate": 1e-2, "tokens_per_update": 40, "warmup": 0} | (training or {})
    drafter = {"kind": kind, "model": None if folder is None else str(folder), "training": fields}
    return toys.config(output, online_drafter=drafter, steps=4, prompts_per_step=3, **changes)


def checkpoint(kind, policy, folder):
    """A drafter's checkpoint folder for `policy`, with which a service could be started."""
    torch.manual_seed(5)
    policy.save_pretrained(folder)
    toys.character_tokenizer().save_pretrained(folder)
    if kind == "eagle3":
        Eagle3Head.from_policy(policy, (0, 1, 2), list(range(12))).write(folder / "head", folder, torch.float32)
        return folder / "head"
    if kind == "draft_model":
        toys.llama(seed=9).save_pretrained(folder / "small")
        return folder / "small"
    MTPHead.from_policy(policy).write(folder, folder, torch.float32)
    return folder


def run(config, model, source, with_drafter=True):
    learner = LocalLearner(config, model())
    drafter = OnlineDrafter.load(config, learner.policy) if with_drafter else None
    loop = toys.loop(config, learner, source, drafter=drafter)
    loop.run()
    return loop


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_the_policys_training_is_bit_identical_with_online_training_on_and_off(name, kind, tmp_path):
    model = POLICIES[name]
    folder = checkpoint(kind, model(), tmp_path / "start")
    changes = {"minibatches": 2, "epochs": 2, "gradient_checkpointing": name == "llama"}
    on = settings(tmp_path / "on", kind, folder, **changes)
    off = settings(tmp_path / "off", kind, folder, **changes)
    with_drafter, without = (
        run(on, model, Source(toys.llama())),
        run(off, model, Source(toys.llama()), with_drafter=False),
    )
    assert with_drafter.drafter.trained_steps == 4
    mine, theirs = (checkpoints(output)[-1] for output in (tmp_path / "on", tmp_path / "off"))
    for file in ("model.safetensors", "trainer/optimiser.safetensors", "trainer/generators.safetensors"):
        assert (mine / file).read_bytes() == (theirs / file).read_bytes()
    timeless = {"stages", "seconds", "tokens_per_second", "exposed_generation", "learner_idle"}
    logs = [[m.model_dump(exclude=timeless) for m in loop.reporter.log.steps] for loop in (with_drafter, without)]
    assert logs[0] == logs[1]
    assert all(parameter.grad is not None for parameter in with_drafter.drafter.learner.parameters())


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_the_drafter_learns_and_every_push_holds_what_the_engine_loads(name, kind, tmp_path):
    model = POLICIES[name]
    folder = checkpoint(kind, model(), tmp_path / "start")
    source = Source(toys.llama())
    loop = run(settings(tmp_path / "run", kind, folder), model, source)
    before = load_learner(kind, folder, model()).checkpoint()
    assert all(torch.equal(before[name], tensor) for name, tensor in source.pushed[0].items()), "as in the checkpoint"
    assert [pushed.keys() for pushed in source.pushed] == [before.keys()] * 5, "before each step, and at the end"
    changed = [n for n in before if before[n].is_floating_point() and not torch.equal(before[n], source.pushed[3][n])]
    assert changed
    assert not any("embed_tokens" in name for name in changed if kind == "eagle3")
    lines = loop.reporter.log.drafter
    assert [m.drafter_version for m in lines] == [1, 2, 3, 4]
    assert [m.drafter_age for m in lines] == [0, 0, 0, 0]
    assert lines[-1].loss < lines[0].loss
    assert all(m.updates > 1 and m.seconds > 0 for m in lines)


def test_hysteresis_trains_from_the_fall_of_acceptance_until_its_recovery():
    rule = UpdateRule(OnlineTraining(when="adaptive", start_below=0.95, stop_above=0.98))
    lengths = [3.0, 2.9, 2.8, 2.9, 2.96, 2.88, 2.84]
    assert [rule.is_due(step, length) for step, length in enumerate(lengths)] == [
        False, False, True, True, False, False, True,
    ]  # fmt: skip
    assert rule.best == 3.0


def test_the_rules_every_and_never_train_at_the_right_steps():
    for fields, expected in [({"every": 3}, [0, 3, 6]), ({"when": "never"}, []), ({}, list(range(8)))]:
        rule = UpdateRule(OnlineTraining(**fields))
        assert [step for step in range(8) if rule.is_due(step, 2.0)] == expected


def test_the_drafters_learning_rate_warms_up_and_continues_to_rise_after_a_resume(tmp_path):
    folder = checkpoint("eagle3", toys.llama(), tmp_path / "start")
    config = settings(tmp_path / "run", "eagle3", folder, {"warmup": 24})
    drafter = run(config, toys.llama, Source(toys.llama())).drafter
    updates = drafter.trainer.updates
    assert 4 < updates < 24
    assert drafter.trainer.optimiser.param_groups[0]["lr"] == pytest.approx(1e-2 * updates / 24)
    again = OnlineDrafter.load(config, toys.llama())
    again.restore(checkpoints(config.output)[-1])
    assert again.trainer.updates == updates


def test_a_drafter_that_is_not_due_is_neither_trained_nor_pushed(tmp_path):
    folder = checkpoint("eagle3", toys.llama(), tmp_path / "start")
    source = Source(toys.llama(), falling)
    loop = run(settings(tmp_path / "run", "eagle3", folder, {"when": "adaptive"}), toys.llama, source)
    lines = loop.reporter.log.drafter
    assert [m.updates > 0 for m in lines] == [False, False, True, True]
    assert [m.drafter_version for m in lines] == [1, 1, 1, 2]
    assert [m.drafter_age for m in lines] == [0, 1, 2, 0]
    assert pushes(lines) == [4]
    plot_acceptance(tmp_path / "acceptance.png", loop.reporter.log.steps, lines)
    assert (tmp_path / "acceptance.png").stat().st_size > 1000


def falling(version):
    """Acceptance falls before the third step, so an adaptive drafter is trained from then on."""
    return [0, 0, 4] if version < 3 else [4, 0, 0]


@pytest.mark.parametrize(("when", "trained_steps"), [("every", 2), ("adaptive", 0)])
@pytest.mark.parametrize("where", ["generation", "after the drafter has learned"])
def test_a_resumed_run_goes_on_with_the_identical_drafter(where, when, trained_steps, tmp_path, monkeypatch):
    folder = checkpoint("eagle3", toys.llama(), tmp_path / "start")
    recording = tmp_path / "recording"
    whole = settings(tmp_path / "whole", "eagle3", folder, {"when": when})
    source = Source(toys.llama(), falling if when == "adaptive" else None)
    uninterrupted = run(whole, toys.llama, Recorder(source, Recording(recording)))

    config = settings(tmp_path / "cut", "eagle3", folder, {"when": when})
    learner = LocalLearner(config, toys.llama())
    cut = toys.loop(config, learner, ReplaySource(recording), drafter=OnlineDrafter.load(config, learner.policy))
    name = "_generate" if where == "generation" else "reference_logprobs"
    owner = type(cut) if where == "generation" else LocalLearner
    original = getattr(owner, name)

    def interrupted(self, *arguments, **named):
        if cut.state.step == 2:
            raise Interrupted(signal.SIGINT)
        return original(self, *arguments, **named)

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(Interrupted):
        cut.run()
    monkeypatch.setattr(owner, name, original)
    latest = cut.save()
    assert json.loads((latest / "trainer" / "drafter.json").read_text())["trained_steps"] == trained_steps
    assert load_learner("eagle3", latest / "drafter", load_policy(latest)) is not None

    learner = LocalLearner(config, toys.llama())
    drafter = OnlineDrafter.load(config, learner.policy)
    state = restore_checkpoint(latest, learner, drafter)
    loop = toys.loop(config, learner, ReplaySource(recording), state, drafter=drafter)
    loop.run()
    mine, theirs = (checkpoints(output)[-1] / "trainer" / "drafter.safetensors" for output in
                    (config.output, whole.output))  # fmt: skip
    assert load_file(mine).keys() == load_file(theirs).keys()
    assert mine.read_bytes() == theirs.read_bytes()
    assert [m.loss for m in loop.reporter.log.drafter] == [m.loss for m in uninterrupted.reporter.log.drafter]


def test_a_head_with_a_copied_embedding_shares_the_policys_also_after_a_resume(tmp_path):
    """The copy is compared with the policy that the service started with, and not with the trained policy."""
    folder = checkpoint("eagle3", toys.llama(), tmp_path / "start")
    weights, embedding = load_file(folder / "model.safetensors"), toys.llama().get_input_embeddings().weight
    save_file(weights | {"embed_tokens.weight": embedding.detach().clone()}, folder / "model.safetensors")
    start = {"model": str(tmp_path / "start"), "keep_checkpoints": 9, "checkpoint_every": 2}
    config = settings(tmp_path / "run", "eagle3", folder, **start)
    (learner, drafter), source = make_learners(config), Source(toys.llama())
    toys.loop(config, learner, source, drafter=drafter).run()
    whole = checkpoints(config.output)[-1]

    again = settings(tmp_path / "again", "eagle3", folder, **start, resume=True)
    half = checkpoints(config.output)[-2]
    shutil.copytree(half, again.output / "checkpoints" / half.name)
    learner, drafter = make_learners(again)
    assert not drafter.learner.not_trained
    toys.loop(again, learner, Source(toys.llama()), begin_state(again), drafter=drafter).run()
    latest = checkpoints(again.output)[-1] / "trainer" / "drafter.safetensors"
    assert latest.read_bytes() == (whole / "trainer" / "drafter.safetensors").read_bytes()


def test_acceptance_is_reported_by_context_length(tmp_path):
    folder = checkpoint("eagle3", toys.llama(), tmp_path / "start")
    config = settings(tmp_path / "run", "eagle3", folder, {"when": "never"})
    line = run(config, toys.llama, Source(toys.llama())).reporter.log.drafter[0]
    # Prompts of four tokens: steps that accept 1 and 2 begin with 5 and 7 tokens of context.
    assert [(c.from_tokens, c.draft_steps, c.accepted) for c in line.by_context_length] == [(4, 24, 36)]
    assert line.acceptance_length == pytest.approx(2.5)


class Service:
    """The part of a rollout service's client that pushes a drafter."""

    def __init__(self, drafter):
        self.drafter, self.pushes = drafter, []

    def weights(self):
        policy = WeightStatus(version=4, tensors=1, bytes=1, checksum="")
        return WeightsStatus(policy=policy, drafter=self.drafter, dtype="float32", shared_memory="")

    def push_weights(self, of, tensors, version, run, take_over):
        self.pushes.append((of, version))
        self.drafter = WeightStatus(version=version, tensors=1, bytes=1, checksum=tensors_checksum(tensors))


def test_a_drafter_that_the_service_already_holds_is_pushed_only_if_it_is_new():
    service = Service(WeightStatus(version=0, tensors=1, bytes=0, checksum=""))
    publish, export = Ownership(service, "a").publish, lambda dtype: {"fc.weight": torch.ones(3, dtype=dtype)}
    assert publish("drafter", export, 0, is_new=False) == 1, "the service's tensors are not known"
    assert publish("drafter", export, 0, is_new=False) == 1
    assert publish("drafter", export, 5, is_new=True) == 6, "the service then reports that nothing changed"
    assert service.pushes == [("drafter", 1), ("drafter", 6)]


def test_a_service_whose_drafter_has_no_weights_says_what_to_do():
    with pytest.raises(RolloutError, match="start the service with one"):
        Ownership(Service(None), "a").publish("drafter", lambda dtype: {}, 0, is_new=True)


class ServiceWithDrafter(QueueService):
    """A toy service for asynchronous training, which restarts during the second push of its drafter."""

    def __init__(self):
        super().__init__()
        self.drafter, self.pushes = WeightStatus(version=0, tensors=1, bytes=0, checksum=""), []

    def weights(self):
        return super().weights().model_copy(update={"drafter": self.drafter})

    def push_weights(self, of, tensors, version, run=None, take_over=False):
        if of == "policy":
            return super().push_weights(of, tensors, version, run, take_over)
        self.pushes.append(version)
        if len(self.pushes) == 2:
            raise RolloutError(503, ErrorBody(error="starting"))
        self.drafter = WeightStatus(version=version, tensors=1, bytes=1, checksum=tensors_checksum(tensors))
        return self.drafter


def test_the_asynchronous_loop_pushes_its_drafter_again_after_the_service_was_down(tmp_path):
    folder = checkpoint("eagle3", toys.llama(), tmp_path / "start")
    config = settings(tmp_path / "run", "eagle3", folder, mode="async")
    learner = LocalLearner(config, toys.llama())
    drafter, service = OnlineDrafter.load(config, learner.policy), ServiceWithDrafter()
    with RewardsPool(toys.CountLetterA, processes=1, timeout=30.0) as pool:
        running = asynchronous_loop(config, service, pool, learner, drafter=drafter)
        running.run()
    service.close()
    assert service.pushes == [1, 2, 2, 3, 4], "at the start and after each of four steps; the second one failed"
    assert service.drafter.checksum == tensors_checksum(drafter.export(torch.float32))
    assert drafter.version == 4

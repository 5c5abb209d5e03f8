"""Weight updates of several calls: one at a time, pushed whole, and dropped when their trainer is gone."""

import asyncio
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafters.files.checkpoint_folder import TensorSpec
from rollout_service.fleet import updates as module
from rollout_service.fleet.member import FleetError
from rollout_service.fleet.updates import Updates, version_number
from rollout_service.protocol import WeightStatus
from rollout_service.transports import RefusedUpdate
from rollout_service.weights.versions import WeightSet

TENSORS = {"a": torch.ones(2), "b": torch.ones(3)}
EXPECTED = {name: TensorSpec(tuple(tensor.shape), "F32") for name, tensor in TENSORS.items()}


@pytest.fixture
def updates(tmp_path, monkeypatch):
    """Updates over a fleet that only notes what is pushed: `pushed` has (version, tensors)."""
    shared = tmp_path / "shared"
    shared.mkdir()
    weights = WeightSet("policy", EXPECTED, "float32")
    policy = tmp_path / "policy"
    policy.mkdir()
    (policy / "config.json").write_text("{}")
    save_file(TENSORS, policy / "model.safetensors")
    numbers = iter(range(1000))
    folder = SimpleNamespace(path=shared, new_file=lambda: shared / f"received-{next(numbers)}.safetensors")
    store = SimpleNamespace(
        sets={"policy": weights}, folder=folder, policy_folder=policy, version=lambda of: weights.version
    )
    pushed, relabelled = [], []

    async def push(of, version, update, over=None):
        weights.check(version, update)
        if over not in (None, weights.version):
            return weights.status.model_copy(update={"skipped": True})
        await asyncio.sleep(0.01)
        pushed.append((version, load_file(update.file)))
        update.file.unlink()
        weights.status = WeightStatus(version=version, tensors=2, bytes=0, checksum="")
        return weights.status

    async def relabel(version):
        relabelled.append(version)
        return weights.status

    made = Updates(store, SimpleNamespace(push=push, relabel=relabel), None, "cpu")
    made.pushed, made.relabelled, made.folder, made.weights = pushed, relabelled, shared, weights
    return made


def saved(tensors, folder):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def received(updates):
    return list(updates.folder.glob("received-*"))


async def test_an_update_is_pushed_whole_as_the_next_version(updates, tmp_path):
    for version in (1, 2):
        await updates.start("policy")
        await updates.update({"weight_dir": saved({"a": TENSORS["a"]}, tmp_path / "first")})
        save_file({"b": TENSORS["b"].double()}, updates.folder / "push-1.safetensors")
        await updates.update({"file": "push-1.safetensors"})
        pushed = await updates.finish(None)
        assert pushed.status.version == version
    assert [version for version, _ in updates.pushed] == [1, 2]
    assert all(torch.equal(updates.pushed[1][1][name], TENSORS[name]) for name in TENSORS)
    assert updates.session is None


async def test_a_second_session_is_refused_and_says_since_when_the_first_is_open(updates):
    await updates.start("policy")
    with pytest.raises(RefusedUpdate, match=r"is open since \d\d:\d\d:\d\d.*init_weight_transfer_engine") as refusal:
        await updates.start("policy")
    assert refusal.value.status == 409
    assert len(received(updates)) == 1


async def test_two_that_start_at_the_same_time_get_one_session(updates):
    results = await asyncio.gather(*(updates.start("policy") for _ in range(3)), return_exceptions=True)
    assert sum(isinstance(result, RefusedUpdate) for result in results) == 2
    assert len(received(updates)) == 1


@pytest.mark.parametrize("call", [lambda u: u.update({"weight_dir": "/x"}), lambda u: u.finish(None)])
async def test_without_a_session_nothing_can_be_updated(updates, call):
    with pytest.raises(RefusedUpdate, match="start_weight_update first") as refusal:
        await call(updates)
    assert refusal.value.status == 409


async def test_an_update_that_lacks_a_tensor_pushes_nothing_and_leaves_no_file(updates, tmp_path):
    await updates.start("policy")
    await updates.update({"weight_dir": saved({"a": TENSORS["a"]}, tmp_path / "first")})
    with pytest.raises(RefusedUpdate) as refusal:
        await updates.finish(None)
    assert [problem.field for problem in refusal.value.problems] == ["b"]
    assert (updates.pushed, received(updates), updates.session) == ([], [], None)


async def test_an_update_that_fails_ends_its_session_so_that_a_finish_afterwards_publishes_nothing(updates, tmp_path):
    """TRL calls finish after a failed update, whatever the failure was."""
    await updates.start("policy")
    await updates.update({"weight_dir": saved(TENSORS, tmp_path / "whole")})
    with pytest.raises(RefusedUpdate):
        await updates.update({"weight_dir": saved({"wrong": torch.ones(1)}, tmp_path / "wrong")})
    with pytest.raises(RefusedUpdate, match="no weight update is open"):
        await updates.finish(None)
    assert (updates.pushed, received(updates)) == ([], [])


async def test_a_wrong_version_leaves_the_session_open(updates, tmp_path):
    await updates.start("policy")
    await updates.update({"weight_dir": saved(TENSORS, tmp_path / "whole")})
    for version, status in (("0", 400), ("x", 400), ("-1", 400)):
        with pytest.raises(RefusedUpdate) as refusal:
            await updates.finish(version)
        assert refusal.value.status == status
    assert (await updates.finish("7")).status.version == 7
    await updates.start("policy")
    with pytest.raises(RefusedUpdate, match="only grow") as refusal:
        await updates.finish("7")
    assert refusal.value.status == 409


async def test_a_silent_session_is_dropped_and_its_memory_freed(updates, monkeypatch, caplog):
    monkeypatch.setattr(module, "SILENCE", 0.02)
    await updates.start("policy")
    await asyncio.sleep(0.06)
    assert (received(updates), updates.session) == ([], None)
    assert "a weight update was dropped" in caplog.text
    await updates.start("policy")


async def test_a_session_is_not_silent_while_a_call_is_at_work(updates, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "SILENCE", 0.02)
    await updates.start("policy")

    async def slow(update, info):
        await asyncio.sleep(0.06)

    monkeypatch.setattr(updates, "_read", slow)
    at_work = asyncio.create_task(updates.update({"file": "x"}))
    await asyncio.sleep(0)
    with pytest.raises(RefusedUpdate, match="another call of this weight update is under way"):
        await updates.finish(None)
    await at_work
    assert updates.session is not None


async def test_a_folder_that_is_sent_again_while_it_is_pushed_is_pushed_once(updates, tmp_path):
    """prime-rl sends it again when the answer takes long."""
    folder = saved(TENSORS, tmp_path / "whole")
    first, second = await asyncio.gather(*(updates.push_folder("policy", folder) for _ in range(2)))
    assert first is second
    assert len(updates.pushed) == 1
    assert (await updates.push_folder("policy", folder)).status.version == 2


async def test_updates_that_end_at_the_same_time_get_numbers_of_their_own(updates, tmp_path):
    folders = [saved(TENSORS, tmp_path / name) for name in ("one", "two")]
    pushed = await asyncio.gather(*(updates.push_folder("policy", folder) for folder in folders))
    assert sorted(one.status.version for one in pushed) == [1, 2]


async def test_weights_that_belong_to_a_run_stay_protected(updates, tmp_path):
    folder = saved(TENSORS, tmp_path / "whole")
    updates.weights.status = updates.weights.status.model_copy(update={"run": "a", "version": 3})
    for call in (updates.start("policy"), updates.push_folder("policy", folder), updates.relabel("9")):
        with pytest.raises(RefusedUpdate, match="belongs to the run 'a'") as refusal:
            await call
        assert refusal.value.status == 409
    assert (updates.pushed, updates.relabelled) == ([], [])


async def test_the_checkpoint_is_relabelled_by_a_push_of_it_and_what_was_pushed_by_its_number(updates):
    await updates.relabel("4")
    assert [version for version, _ in updates.pushed] == [4]
    await updates.relabel("6")
    assert updates.relabelled == [6]
    with pytest.raises(RefusedUpdate, match="only grow"):
        await updates.relabel("4")


async def test_a_relabel_does_not_put_the_checkpoint_over_weights_that_came_meanwhile(updates, tmp_path):
    relabel = asyncio.create_task(updates.relabel("9"))
    while not received(updates):
        await asyncio.sleep(0.001)
    updates.weights.status = updates.weights.status.model_copy(update={"version": 1})  # another client's push
    await relabel
    assert (updates.pushed, updates.relabelled) == ([], [9])


async def test_a_drafter_without_weights_is_refused(updates):
    with pytest.raises(RefusedUpdate, match="no weights of its own"):
        await updates.start("drafter")


@pytest.mark.parametrize(
    "info",
    [{"file": "../x"}, {"file": "push-gone.safetensors"}, {"weight_dir": "/gone"}, {"weight_dir": "/x", "more": 1}],
)
async def test_a_source_that_is_not_there_ends_the_session(updates, info):
    await updates.start("policy")
    with pytest.raises(ValueError, match=r"."):
        await updates.update(info)
    assert (received(updates), updates.session) == ([], None)


async def test_on_a_cpu_a_transfer_is_refused_before_any_work_and_names_what_works(updates):
    with pytest.raises(RefusedUpdate, match=r"need a GPU.*POST /v1/weights/policy.*weight_dir.*file") as refusal:
        await updates.open_transfer({"master_address": "::1"})
    assert refusal.value.status == 400
    await updates.close_transfer()


def on_a_gpu(updates, receive):
    """The first engine is a GPU's, whose `receive` is given."""
    updates.transfer.device = "cuda"

    async def of_the_first(what, *arguments):
        return await receive(*arguments) if what == "receive" else "nccl"

    updates.transfer.controls = SimpleNamespace(of_the_first=of_the_first)


async def test_a_transfer_fills_the_session_and_a_new_connection_drops_it(updates, tmp_path):
    async def receive(info, file, rules, written):
        module.UpdateFile(module.Path(file), rules, written).write((name, TENSORS[name]) for name in info["names"])
        return written | set(info["names"])

    on_a_gpu(updates, receive)
    await updates.open_transfer({"master_address": "::1"})
    await updates.start("policy")
    await updates.update({"names": ["a"], "dtype_names": ["float32"], "shapes": [[2]]})
    await updates.update({"names": ["b"], "dtype_names": ["float32"], "shapes": [[3]]})
    assert (await updates.finish(None)).status.version == 1
    await updates.start("policy")
    await updates.open_transfer({"master_address": "::1"})
    assert (updates.session, received(updates)) == (None, [])


async def test_a_new_connection_leaves_alone_what_is_being_pushed(updates, tmp_path):
    on_a_gpu(updates, None)
    await updates.start("policy")
    await updates.update({"weight_dir": saved(TENSORS, tmp_path / "whole")})
    finish = asyncio.create_task(updates.finish(None))
    while not updates._numbering.locked():
        await asyncio.sleep(0.001)
    await updates.open_transfer({"master_address": "::1"})
    assert len(received(updates)) == 1
    assert (await finish).status.version == 1


async def test_a_transfer_whose_session_was_dropped_does_not_bring_it_back(updates, monkeypatch):
    ended = asyncio.Event()

    async def receive(*_):
        await ended.wait()
        return set()

    on_a_gpu(updates, receive)
    await updates.start("policy")
    stuck = asyncio.create_task(updates.update({"names": ["a"]}))
    await asyncio.sleep(0.01)
    await updates.open_transfer({"master_address": "::1"})
    await updates.start("policy")
    second = updates.session
    ended.set()
    with pytest.raises(RefusedUpdate, match="was dropped"):
        await stuck
    assert updates.session is second
    assert len(received(updates)) == 1


async def test_a_transfer_that_never_ends_is_given_up(updates, monkeypatch):
    on_a_gpu(updates, lambda *_: asyncio.Event().wait())
    monkeypatch.setattr("rollout_service.fleet.transfer.RECEIVE_WITHIN", 0.02)
    await updates.start("policy")
    with pytest.raises(FleetError, match="took more than"):
        await updates.update({"names": ["a"]})
    assert updates.session is None


async def test_a_transfer_of_an_unknown_tensor_is_refused_before_it_begins(updates):
    on_a_gpu(updates, None)
    await updates.start("policy")
    with pytest.raises(RefusedUpdate) as refusal:
        await updates.update({"names": ["wrong"]})
    assert refusal.value.problems[0].field == "wrong"


@pytest.mark.parametrize("text", ["", "0", "1.0", "-3", "+3", "v3", "٣", "9" * 5000, str(2**53)])
def test_what_is_no_version_is_refused(text):
    with pytest.raises(RefusedUpdate, match="give a whole number from 1"):
        version_number(text, "new_version")

"""The file of an update of several calls: what is taken, cast, left out and refused by name."""

import pickle
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafters.files.checkpoint_folder import TensorSpec
from rollout_service.engine.transfer import TransferReceiver
from rollout_service.engine.update_file import TensorRules, UpdateFile
from rollout_service.transports import RefusedUpdate
from rollout_service.weights.checkpoint_files import folder_files, write_files

EMBEDDING = "model.embed_tokens.weight"
SPECS = {
    EMBEDDING: TensorSpec((3, 2), "BF16"),
    "norm": TensorSpec((3,), "BF16"),
    "ids": TensorSpec((2,), "I64"),
}
TENSORS = {EMBEDDING: torch.rand(3, 2), "norm": torch.rand(3, dtype=torch.float64), "ids": torch.tensor([1, 2])}


@pytest.fixture
def made(tmp_path):
    """Makes an empty update."""

    def make(expected=SPECS, of="policy", **more):
        file = tmp_path / "received.safetensors"
        file.write_bytes(b"what was in the spare file" * 100)
        return UpdateFile.create(file, TensorRules(of, expected, **more))

    return make


def test_tensors_are_cast_to_the_services_dtypes_in_any_number_of_calls(made):
    update = made()
    for name, tensor in TENSORS.items():
        update.write([(name, tensor)])
    update.complete()
    held = load_file(update.file)
    assert held.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        wanted = tensor if name == "ids" else tensor.to(torch.bfloat16)
        assert torch.equal(held[name], wanted)
        assert held[name].dtype == wanted.dtype


def test_every_tensor_that_did_not_come_is_named(made):
    update = made()
    update.write([("norm", TENSORS["norm"])])
    with pytest.raises(RefusedUpdate, match="2 of 3 tensors did not come") as refusal:
        update.complete()
    assert [problem.field for problem in refusal.value.problems] == [EMBEDDING, "ids"]


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.norm", torch.rand(3), "unknown"),
        ("norm", torch.rand(4), r"shape \[4\], expected \[3\]"),
        ("norm", torch.ones(3, dtype=torch.int32), "dtype I32, which does not become BF16"),
        ("ids", torch.ones(2), "dtype F32, which does not become I64"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_by_name(made, name, tensor, message):
    with pytest.raises(RefusedUpdate) as refusal:
        made().write([(name, tensor)])
    (problem,) = refusal.value.problems
    assert problem.field == name
    assert re.search(message, problem.message)


def test_tensors_of_the_other_weight_set_are_left_out_and_named(made):
    update = made(others=frozenset({"drafter.fc"}))
    update.write([("drafter.fc", torch.ones(1)), ("mtp.fc.weight", torch.ones(1))])
    assert update.left_out == {"drafter.fc", "mtp.fc.weight"}
    assert update.written == set()


def test_mtp_names_are_the_drafters_own_in_its_update(made):
    with pytest.raises(RefusedUpdate, match=r"1 of its tensors do not fit"):
        made(of="drafter").write([("mtp.fc.weight", torch.ones(1))])


def test_a_tied_head_that_the_checkpoint_does_not_list_must_be_the_embedding(made):
    update = made()
    update.write(TENSORS.items())
    update.write([("lm_head.weight", TENSORS[EMBEDDING].clone())])
    assert update.left_out == {"lm_head.weight"}
    with pytest.raises(RefusedUpdate) as refusal:
        update.write([("lm_head.weight", TENSORS[EMBEDDING] + 1)])
    assert "this head differs from it" in refusal.value.problems[0].message


def test_a_tied_head_before_its_embedding_is_refused(made):
    with pytest.raises(RefusedUpdate) as refusal:
        made().write([("lm_head.weight", TENSORS[EMBEDDING])])
    assert f"send {EMBEDDING} first" in refusal.value.problems[0].message


def test_a_listed_head_is_the_embedding_only_if_the_model_ties_them(made):
    listed = SPECS | {"lm_head.weight": TensorSpec((3, 2), "BF16")}
    update = made(listed, head_is_tied=True)
    update.write(TENSORS.items())
    update.complete()
    held = load_file(update.file)
    assert torch.equal(held["lm_head.weight"], held[EMBEDDING])
    untied = made(listed)
    untied.write(TENSORS.items())
    with pytest.raises(RefusedUpdate) as refusal:
        untied.complete()
    assert [problem.field for problem in refusal.value.problems] == ["lm_head.weight"]


def test_a_refusal_in_an_engine_reaches_the_front_whole():
    refusal = RefusedUpdate("no", [], status=409)
    again = pickle.loads(pickle.dumps(refusal))
    assert (str(again), again.problems, again.status) == ("no", [], 409)


# --- folders ---


def test_a_folder_is_judged_whole_before_any_of_it_is_written(made, tmp_path):
    save_file({"norm": torch.rand(3), "a": torch.rand(1), "b": torch.rand(1)}, tmp_path / "model.safetensors")
    update = made()
    with pytest.raises(RefusedUpdate) as refusal:
        write_files(update, folder_files(str(tmp_path)))
    assert {problem.field for problem in refusal.value.problems} == {"a", "b"}
    assert update.written == set()


def test_a_tied_head_in_a_file_before_the_embeddings_is_compared(made, tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    save_file({"lm_head.weight": TENSORS[EMBEDDING].clone()}, folder / "a.safetensors")
    save_file(TENSORS, folder / "b.safetensors")
    update = made()
    write_files(update, folder_files(str(folder)))
    update.complete()
    assert update.left_out == {"lm_head.weight"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no safetensors files"),
        ({"model.safetensors.index.json": '{"weight_map": {"norm": "gone.safetensors"}}'}, "lacks gone.safetensors"),
        ({"model.safetensors.index.json": '{"weight_'}, "its index is not readable"),
        ({"model.safetensors.index.json": "{}"}, "its index is not readable"),
        ({"model.safetensors": "\x10\0\0\0\0\0\0\0{"}, "not a readable safetensors file"),
    ],
)
def test_a_folder_that_is_still_being_written_is_refused(made, tmp_path, files, message):
    folder = tmp_path / "weights"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(RefusedUpdate, match=f"{message}.*still being written") as refusal:
        write_files(made(), folder_files(str(folder)))
    assert refusal.value.status == 400


@pytest.mark.parametrize("folder", [None, "", 5, "/no/such/folder", __file__])
def test_what_is_no_folder_is_refused(folder):
    with pytest.raises(RefusedUpdate, match="folder on the service's machine"):
        folder_files(folder)


# --- the stand-in of a transfer ---


class FakeTransfer:
    """vLLM's transfer engine, as far as the receiver uses it. It "receives" what `update_info` names."""

    def __init__(self, vllm_config, backend, model):
        self.backend, self.model, self.ended = backend, model, False

    def parse_init_info(self, init_info):
        return SimpleNamespace(**init_info)

    def init_transfer_engine(self, init_info):
        self.joined = init_info

    def update_weights(self, update_info):
        for name in update_info["names"]:  # as unpacked NCCL does, one at a time
            self.model.load_weights([(name, TENSORS.get(name, torch.ones(1)))])

    def shutdown(self):
        self.ended = True


async def test_a_transfer_fills_the_file_through_the_stand_in(made):
    update = made()
    receiver = TransferReceiver(None, {"master_address": "::1"}, FakeTransfer)
    await receiver.open({"master_address": "::1"})
    assert receiver.engine.joined.master_address == "::1"
    for names in (["norm"], [EMBEDDING, "ids", "mtp.fc.weight"]):
        info = {"names": names}
        update.written |= await receiver.receive(info, str(update.file), update.rules, update.written)
    update.complete()
    assert torch.equal(load_file(update.file)["norm"], TENSORS["norm"].to(torch.bfloat16))
    await receiver.close()
    assert receiver.engine.ended


async def test_a_transfer_of_an_unknown_tensor_is_refused_by_name(made):
    update, receiver = made(), TransferReceiver(None, {"packed": True}, FakeTransfer)
    with pytest.raises(RefusedUpdate) as refusal:
        await receiver.receive({"names": ["wrong"]}, str(update.file), update.rules, set())
    assert refusal.value.problems[0].field == "wrong"


@pytest.mark.parametrize(
    ("init_info", "backend"),
    [({"master_address": "::1", "packed": True}, "nccl"), ({"nccl_unique_id_b64": "AA"}, "nccl"),
     ({"packed": True}, "ipc"), ({"master_address": None}, "ipc")],
)  # fmt: skip
def test_the_transport_follows_from_what_the_trainer_sends(init_info, backend):
    assert TransferReceiver(None, init_info, FakeTransfer).engine.backend == backend

"""Weight files: a wrong update is refused as a whole, with every fault named, before any engine is touched."""

import json

import pytest
import torch
from safetensors.torch import save_file

from drafters.files.checkpoint_folder import checkpoint_specs, is_unused_buffer, tensor_specs, write_index
from drafters.registry import DrafterConfig, make_drafter
from rollout_service.config import ServiceConfig
from rollout_service.engine.loading import WeightsFile
from rollout_service.fleet.fleet import Fleet
from rollout_service.protocol import SharedMemoryPush
from rollout_service.transports import RefusedUpdate, Update
from rollout_service.transports.folder import make_writable
from rollout_service.transports.shared_memory import SharedMemoryReceiver
from rollout_service.weights.manifest import problems
from rollout_service.weights.versions import WeightStore

POLICY = {
    "model.embed_tokens.weight": torch.zeros(8, 4),
    "model.norm.weight": torch.zeros(4),
    "lm_head.weight": torch.zeros(8, 4),
    "mtp.fc.weight": torch.zeros(4, 8),
}
PUSHED = {name: tensor for name, tensor in POLICY.items() if not name.startswith("mtp.")}


@pytest.fixture
def policy(tmp_path):
    folder = tmp_path / "policy"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"num_nextn_predict_layers": 1}))
    save_file({name: tensor.bfloat16() for name, tensor in POLICY.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def store(policy):
    store = WeightStore(policy, make_drafter(DrafterConfig(kind="mtp")), "float32")
    yield store
    store.close()


def pushed(store, tensors):
    file = store.folder.new_file()
    save_file(tensors, file)
    return Update(file, "")


def test_a_head_that_the_configuration_declares_and_no_file_holds_is_refused_before_an_engine_starts(policy):
    save_file(PUSHED, policy / "model.safetensors")
    with pytest.raises(ValueError, match="declares an MTP layer, and its files hold none"):
        Fleet(ServiceConfig(model=str(policy), drafter={"kind": "mtp"}))


def test_a_whole_update_in_the_engines_dtype_is_accepted_and_in_service_only_once_published(store):
    policy, update = store.sets["policy"], pushed(store, PUSHED)
    policy.check(1, update)
    assert policy.status.version == 0
    policy.publish(WeightsFile(1, str(update.file), "", "here", None), seconds=0.0, pause=0.0)
    assert (policy.status.version, policy.status.tensors) == (1, len(PUSHED))
    with pytest.raises(RefusedUpdate):
        policy.check(1, update)


@pytest.mark.parametrize(
    ("change", "field", "says"),
    [
        ({"model.norm.weight": None}, "model.norm.weight", "missing"),
        ({"model.norm.weight": torch.zeros(5)}, "model.norm.weight", "shape [5], expected [4]"),
        ({"model.norm.weight": torch.zeros(4).bfloat16()}, "model.norm.weight", "dtype BF16, expected F32"),
        ({"model.norms.weight": torch.zeros(4)}, "model.norms.weight", "unknown"),
        ({"mtp.fc.weight": torch.zeros(4, 8)}, "mtp.fc.weight", "unknown"),
    ],
)
def test_one_wrong_tensor_is_named_and_refuses_the_update(store, change, field, says):
    tensors = {name: tensor for name, tensor in (PUSHED | change).items() if tensor is not None}
    with pytest.raises(RefusedUpdate) as refusal:
        store.sets["policy"].check(1, pushed(store, tensors))
    assert [p.field for p in refusal.value.problems] == [field]
    assert says in refusal.value.problems[0].message


def test_a_drafters_update_holds_its_own_tensors_and_never_the_policys(store):
    drafter = store.sets["drafter"]
    assert set(drafter.expected) == {"mtp.fc.weight"}
    drafter.check(1, pushed(store, {"mtp.fc.weight": torch.zeros(4, 8)}))
    with pytest.raises(RefusedUpdate, match="the whole drafter update was refused"):
        drafter.check(1, pushed(store, {"mtp.fc.weight": torch.zeros(4, 8), "lm_head.weight": torch.zeros(8, 4)}))


def test_versions_only_grow(store):
    with pytest.raises(RefusedUpdate) as refusal:
        store.sets["policy"].check(0, pushed(store, PUSHED))
    assert refusal.value.status == 409


def test_bytes_that_are_not_safetensors_are_refused_as_such(store):
    file = store.folder.new_file()
    file.write_bytes(b"\x80\x04pickle")
    with pytest.raises(RefusedUpdate, match="safetensors"):
        store.sets["policy"].check(1, Update(file, ""))


def test_a_tied_head_is_not_part_of_an_update(policy):
    (policy / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    expected = checkpoint_specs(policy, lambda name: not name.startswith("mtp."))
    assert set(expected) == {"model.embed_tokens.weight", "model.norm.weight"}


@pytest.mark.parametrize("stray", ["adapter_model.safetensors", "consolidated.safetensors", "model-00009.safetensors"])
def test_a_file_that_the_index_does_not_name_is_not_part_of_an_update(policy, stray):
    write_index(policy)
    save_file({"layers.0.attention.wq.weight": torch.zeros(4, 4)}, policy / stray)
    assert set(checkpoint_specs(policy, lambda name: True)) == set(POLICY)


def test_without_an_index_the_models_own_file_and_its_heads_are_the_checkpoint(policy):
    save_file({"base_model.lora_A.weight": torch.zeros(4, 4)}, policy / "adapter_model.safetensors")
    save_file({"mtp.norm.weight": torch.zeros(4)}, policy / "mtp.safetensors")
    assert set(checkpoint_specs(policy, lambda name: True)) == {*POLICY, "mtp.norm.weight"}


@pytest.mark.parametrize(
    "buffer",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.cos_cached",
        "transformer.h.0.attn.bias",
        "gpt_neox.layers.0.attention.masked_bias",
    ],
)
def test_a_buffer_that_no_engine_loads_is_not_expected_but_may_be_pushed(policy, buffer):
    save_file({buffer: torch.zeros(2)}, policy / "buffers.safetensors")
    write_index(policy)
    store = WeightStore(policy, make_drafter(DrafterConfig(kind="mtp")), "float32")
    try:
        assert buffer not in store.sets["policy"].expected
        for tensors in (PUSHED, PUSHED | {buffer: torch.zeros(2)}):
            store.sets["policy"].check(1, pushed(store, tensors))  # raises where they do not fit
    finally:
        store.close()


@pytest.mark.parametrize(
    "name", ["h.0.attn.c_attn.bias", "model.layers.0.self_attn.q_proj.bias", "rotary_emb.inv_freq.weight"]
)
def test_a_parameter_with_a_similar_name_is_expected(name):
    assert not is_unused_buffer(name)


def test_integer_tensors_keep_their_own_dtype(tmp_path):
    save_file({"d2t": torch.zeros(4, dtype=torch.int64)}, tmp_path / "a.safetensors")
    expected = tensor_specs(tmp_path / "a.safetensors")
    assert problems(expected, expected, "float32") == []


def test_a_file_outside_the_shared_folder_cannot_be_named(store):
    with pytest.raises(RefusedUpdate, match="no file"):
        SharedMemoryReceiver(store.folder).take("elsewhere.safetensors")


@pytest.mark.parametrize("name", ["received-1.safetensors", "spare-policy.safetensors", "../push-1.safetensors"])
def test_a_push_names_no_file_of_the_services_own(name):
    with pytest.raises(ValueError, match="pattern"):
        SharedMemoryPush(file=name)


def test_a_trainer_cannot_write_over_what_it_has_pushed(store):
    (store.folder.path / "push-1.safetensors").write_bytes(b"one")
    file = SharedMemoryReceiver(store.folder).take("push-1.safetensors")
    (store.folder.path / "push-1.safetensors").write_bytes(b"another")
    assert file.read_bytes() == b"one"


def test_the_next_push_reuses_the_memory_of_the_previous_version(store):
    policy = store.sets["policy"]
    first, second = pushed(store, PUSHED).file, pushed(store, PUSHED).file
    same_memory = first.stat().st_ino
    for version, file in ((1, first), (2, second)):
        policy.publish(WeightsFile(version, str(file), "", "here", None), seconds=0.0, pause=0.0)
    assert second.exists()
    assert make_writable(store.folder.new_file(), "policy").stat().st_ino == same_memory
    assert make_writable(store.folder.new_file(), "policy").stat().st_size == 0, "the only spare file is in use"


NEMOTRON_H = [
    "backbone.layers.0.norm.weight",
    *(f"backbone.layers.0.mixer.{name}_proj.weight" for name in "qkvo"),
    "backbone.layers.1.norm.weight",
    "backbone.layers.1.mixer.gate.weight",
    "backbone.layers.1.mixer.gate.e_score_correction_bias",
    *(f"backbone.layers.1.mixer.experts.{e}.{name}_proj.weight" for e in (0, 1) for name in ("up", "down")),
    "backbone.norm_f.weight",
]
OF_BLOCK = [name.replace("backbone", "mtp") for name in NEMOTRON_H if "layers" in name]
OF_HEAD = [f"mtp.layers.{name}.weight" for name in ("0.enorm", "0.hnorm", "0.eh_proj", "1.final_layernorm")]


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ([], None),
        (OF_HEAD[:1], "mtp.layers.0.enorm"),
        (OF_HEAD[-1:], "mtp.layers.1.final_layernorm"),
        (["mtp.layers.0.mixer.q_proj.weight"], "mtp.layers.0.mixer.q_proj"),
        ([name for name in OF_BLOCK if ".experts." in name], "mtp.layers.1.mixer.experts"),
    ],
)
@pytest.mark.parametrize("pattern", [{}, {"mtp_hybrid_override_pattern": "*E"}])
def test_a_nemotron_head_that_lacks_a_module_is_refused_by_the_modules_name(lost, named, pattern):
    config = {"model_type": "nemotron_h", "num_nextn_predict_layers": 1, **pattern}
    tensors = [name for name in NEMOTRON_H + OF_BLOCK + OF_HEAD if name not in lost]
    head = make_drafter(DrafterConfig(kind="mtp"))
    if named is None:
        head.check(config, None, tensors)
    else:
        with pytest.raises(ValueError, match=rf"its files lack {named}: an engine would draft with uninitialised"):
            head.check(config, None, tensors)

"""TRL's adapter: one push for each update, under the checkpoint's names, in the service's dtype. TRL itself is a fake
here; `make test-clients` runs the real one."""

import json
import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from rollout_service.adapters import trl

SMALL = {
    "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "num_hidden_layers": 1,
    "layer_types": ["full_attention"], "hidden_size": 8, "head_dim": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 4,
    "shared_expert_intermediate_size": 4, "vocab_size": 16, "dtype": "float32",
}  # fmt: skip


@pytest.fixture
def pushed(monkeypatch):
    """What was pushed: (version, tensors) for each push. The service is at version 4, in bfloat16."""
    pushes = []

    class Service:
        def __init__(self, endpoint, token):
            self.asked = endpoint, token

        def weights(self):
            return SimpleNamespace(dtype="bfloat16", policy=SimpleNamespace(version=4 + len(pushes)))

        def push_weights(self, of, tensors, version):
            assert of == "policy"
            pushes.append((version, tensors))

    monkeypatch.setattr(trl, "RolloutClient", Service)
    monkeypatch.setattr(trl, "checkpoint_tensors", lambda model, named: named)
    return pushes


@pytest.fixture
def their_client(monkeypatch):
    """TRL's VLLMClient once `use_pushes` has replaced it."""

    class VLLMClient:
        base_url, _updating_weights = "http://service", False

        @contextmanager
        def weight_update(self):
            self._start_weight_update()
            self._updating_weights = True
            yield
            self._updating_weights = False
            self._finish_weight_update()

    generation = SimpleNamespace(VLLMClient=VLLMClient)
    package = ModuleType("trl.generation")
    package.vllm_generation = generation
    monkeypatch.setitem(sys.modules, "trl", ModuleType("trl"))
    monkeypatch.setitem(sys.modules, "trl.generation", package)
    trl.use_pushes("m", token="t")
    client = generation.VLLMClient()
    client.init_communicator(device="cpu")
    return client


def parameters(*names):
    return iter([(name, torch.ones(2)) for name in names])


def test_an_update_is_one_push_of_the_next_version_in_the_services_dtype(pushed):
    pushes = trl.Pushes("http://service", "m")
    pushes.init_weight_transfer()
    pushes.send_weights(parameters("a", "b"))
    pushes.send_weights(parameters("a", "b"))
    assert [version for version, _ in pushed] == [5, 6]
    assert {name: tensor.dtype for name, tensor in pushed[0][1].items()} == {"a": torch.bfloat16, "b": torch.bfloat16}


def test_a_parameter_that_changes_after_it_was_handed_over_is_pushed_as_it_was(pushed):
    parameter = torch.ones(2, dtype=torch.bfloat16)

    def freed_when_the_next_is_asked_for():
        yield "a", parameter
        parameter.zero_()
        yield "b", parameter

    pushes = trl.Pushes("http://service", "m")
    pushes.init_weight_transfer()
    pushes.send_weights(freed_when_the_next_is_asked_for())
    assert pushed[0][1]["a"].tolist() == [1, 1]


def test_trls_client_connects_to_its_own_server_with_the_given_token(pushed, their_client):
    assert their_client.pushes.client.asked == ("http://service", "t")


def test_trls_client_pushes_all_parameters_at_once(pushed, their_client):
    their_client.update_named_params([], parameters("a", "b"))
    assert [sorted(tensors) for _, tensors in pushed] == [["a", "b"]]


def test_parts_that_trls_client_sends_within_one_update_are_one_push(pushed, their_client):
    with their_client.weight_update():
        their_client.update_named_params([], parameters("a"))
        their_client.update_named_params([], parameters("b"))
        assert pushed == []
    assert [sorted(tensors) for _, tensors in pushed] == [["a", "b"]]


def test_fused_experts_get_the_names_of_their_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    named = dict(model.named_parameters())
    assert any(name.endswith("experts.gate_up_proj") for name in named)
    found = trl.checkpoint_tensors(str(tmp_path), named)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        name: tensor.tolist() for name, tensor in saved.items()
    }

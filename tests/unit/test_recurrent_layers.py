"""A drafter for a policy with recurrent layers is refused on a CPU, by every command, before an engine starts."""

import json
from types import SimpleNamespace

import pytest

from drafters.registry import DrafterConfig
from rollout_service.config import ServiceConfig
from rollout_service.engine.arguments import bare_llm
from rollout_service.engine.recurrent_layers import check_by_vllm, check_drafts_are_taken_back, layer_types
from rollout_service.evaluation.audit import audit
from rollout_service.evaluation.audit_config import AuditConfig
from rollout_service.evaluation.calibrate import calibrate
from rollout_service.evaluation.calibrate_config import CalibrateConfig
from rollout_service.evaluation.compare import compare
from rollout_service.evaluation.compare_config import CompareConfig
from rollout_service.evaluation.selftest import selftest
from rollout_service.evaluation.selftest_config import SelftestConfig
from rollout_service.fleet.fleet import Fleet

MAMBA, ATTENTION, EXPERTS = "linear_attention", "full_attention", "moe"
RECURRENT = {
    "3 of type linear_attention": {"model_type": "qwen3_next", "num_hidden_layers": 4},  # by its default
    "2 of type linear_attention": {"model_type": "nemotron_h", "layers_block_type": [MAMBA, ATTENTION, EXPERTS, MAMBA]},
    "1 of type linear_attention": {"model_type": "nemotron_h", "hybrid_override_pattern": "*E*EM-"},
    "4 of type linear_attention": {"model_type": "mamba2", "num_hidden_layers": 4},
    "6 of type linear_attention": {"model_type": "jamba", "num_hidden_layers": 7, "attn_layer_period": 7},
    "2 of type hybrid": {"model_type": "falcon_h1", "num_hidden_layers": 2},
    "1 of type conv": {"model_type": "lfm2", "layer_types": ["conv", ATTENTION], "num_hidden_layers": 2},
    "2 of type recurrent": {"model_type": "recurrent_gemma", "num_hidden_layers": 3},
}
OTHERS = [
    {"model_type": "nemotron_h", "hybrid_override_pattern": "*E*E-"},
    {"model_type": "qwen3_next", "layer_types": [ATTENTION] * 2, "num_hidden_layers": 2},
    {"model_type": "llama"},
    {"model_type": "gemma3_text"},
    {"model_type": "gpt_oss"},
    {"model_type": "known to vLLM alone"},
]
NGRAM = DrafterConfig(kind="ngram")


def saved(folder, config):
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 16}), encoding="utf-8")
    return folder


@pytest.mark.parametrize("layers", RECURRENT)
def test_recurrent_layers_of_every_architecture_are_found_and_counted(layers, tmp_path):
    folder = saved(tmp_path, RECURRENT[layers])
    with pytest.raises(ValueError, match=rf"^drafter.kind: 'ngram' cannot draft .* recurrent layers \({layers}\)"):
        check_drafts_are_taken_back(NGRAM, folder, "cpu")
    check_drafts_are_taken_back(DrafterConfig(), folder, "cpu")
    check_drafts_are_taken_back(NGRAM, folder, "cuda")


@pytest.mark.parametrize("config", OTHERS, ids=lambda config: config["model_type"])
def test_other_policies_may_have_a_drafter(config, tmp_path):
    check_drafts_are_taken_back(NGRAM, saved(tmp_path, config), "cpu")


def test_layers_that_the_file_leaves_out_are_those_of_the_architecture(tmp_path):
    folder = saved(tmp_path, {"model_type": "qwen3_next", "num_hidden_layers": 4, "full_attention_interval": 2})
    assert layer_types(folder) == [MAMBA, ATTENTION] * 2


def test_every_command_refuses_before_an_engine_starts(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("rollout_service.evaluation.arms.Fleet.start", lambda self: started.append(self))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt_token_ids": [3]}\n', encoding="utf-8")
    folder = saved(tmp_path, RECURRENT["2 of type linear_attention"])
    of_engines = {"model": str(folder), "engine": {"device": "cpu", "dtype": "float32"}}
    said, drafter = "drafter.kind: 'mtp' cannot draft for this policy on a CPU", {"kind": "mtp"}
    with pytest.raises(ValueError, match=said):
        Fleet(ServiceConfig(drafter=drafter, **of_engines))
    with pytest.raises(ValueError, match=said):  # the study's engines
        bare_llm(ServiceConfig(drafter=drafter, **of_engines))
    both = [{"kind": "none"}, drafter]
    output = tmp_path / "output"
    for command, config in (
        (compare, CompareConfig(prompts=prompts, drafters=both, engines_at_once=1, output=output, **of_engines)),
        (audit, AuditConfig(drafters=both, output=output, **of_engines)),
        (calibrate, CalibrateConfig(prompts=prompts, drafter=drafter, output=output, **of_engines)),
        (selftest, SelftestConfig(drafters=["none", "mtp"], **of_engines)),
    ):
        with pytest.raises(SystemExit, match=f"rollout-service {command.__name__}: {said}"):
            command(config)
    assert started == []
    assert not output.exists()


@pytest.mark.parametrize("word", ["is_hybrid", "is_attention_free"])
def test_what_only_vllm_knows_is_refused_before_the_policy_is_loaded(word):
    model = SimpleNamespace(
        **{"is_hybrid": False, "is_attention_free": False, word: True}, architecture="NewForCausalLM"
    )
    drafting = SimpleNamespace(model_config=model, speculative_config=SimpleNamespace(method="ngram"))
    with pytest.raises(ValueError, match=r"'ngram' cannot draft .* \(NewForCausalLM\)"):
        check_by_vllm(drafting, "cpu")
    check_by_vllm(drafting, "cuda")
    check_by_vllm(SimpleNamespace(model_config=model, speculative_config=None), "cpu")
    setattr(model, word, False)
    check_by_vllm(drafting, "cpu")

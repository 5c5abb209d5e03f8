"""The worker: what this project asks of vLLM's worker and V2 runner exists, and its face drives the real sampler."""

import ast
import inspect
import textwrap
from pkgutil import resolve_name
from types import SimpleNamespace

import pytest
import torch
from interpreted import CPU, on_the_cpu, samplers
from resolved import DRAFT_TOKENS, STREAMS, resolved, service_config
from vllm.config import set_current_vllm_config
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.spec_decode import init_speculator
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.gpu_worker import Worker

from rollout_service.vllm_plugin import law
from rollout_service.vllm_plugin.face_v2 import CALLED, USED, FaceV2
from rollout_service.vllm_plugin.float32_products import largest_error
from rollout_service.vllm_plugin.patch import APPLIED
from rollout_service.vllm_plugin.table import AT_LOADING, DEFECTS_ON_A_GPU, PATCHES, apply_patches
from rollout_service.vllm_plugin.worker import WorkerExtension


def assigned(function):
    """The attributes of self that a function sets."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}


@pytest.mark.parametrize("name", USED)
def test_vllms_constructors_set_what_the_face_uses(name):
    assert set(USED[name]) <= assigned(resolve_name(name))


def test_the_v2_runner_lacks_the_name_that_the_v1_runner_has():
    """The test above can fail."""
    assert "drafter" not in assigned(GPUModelRunner.__init__)


@pytest.mark.parametrize("name", CALLED)
def test_vllms_functions_have_the_parameters_that_the_face_gives(name):
    assert ", ".join(inspect.signature(resolve_name(name)).parameters) == CALLED[name]


@pytest.mark.parametrize(
    "name", ["get_model", "get_draft_model", "_weight_checksum_prefix", "compute_weight_checksums"]
)
def test_the_worker_has_the_methods_that_the_extension_calls(name):
    assert list(inspect.signature(getattr(Worker, name)).parameters) == ["self"]


def test_vllm_can_mix_the_extension_into_its_worker():
    """vLLM refuses an extension that has a name of the worker's own."""
    own = {name for name in dir(WorkerExtension) if not name.startswith("__")}
    assert own & set(dir(Worker)) == set()


def bare_worker(config):
    """vLLM's worker with our extension, as vLLM mixes it in, without a device."""
    worker = object.__new__(type("Extended", (Worker, WorkerExtension), {}))
    worker.vllm_config, worker.model_config = config, config.model_config
    worker.use_v2_model_runner, worker.device = config.use_v2_model_runner, torch.device("cuda")
    return worker


def test_the_worker_makes_a_v2_runner_and_takes_its_face(monkeypatch):
    monkeypatch.setattr(GPUModelRunner, "__init__", lambda self, config, device: None)
    worker = bare_worker(resolved(service_config("mtp")))
    worker.model_runner = worker._make_model_runner()
    assert type(worker.model_runner) is GPUModelRunner
    assert type(worker.face) is FaceV2


SPECULATORS = {
    "mtp": "MTPSpeculator",
    "eagle3": "EagleSpeculator",
    "draft_model": "StandaloneARSpeculator",
    "ngram": "NgramGPUSpeculator",
}


def speculator(config):
    """The drafter that the V2 runner makes, on the CPU and without its weights."""
    states = RequestState(STREAMS, 256, 512, DRAFT_TOKENS, 64, CPU, use_dense_all_token_ids=True)
    with set_current_vllm_config(config):
        return init_speculator(config, CPU, states)


def running_worker(monkeypatch, kind, **drafter):
    """A worker whose runner has vLLM's own sampler, verifier and drafter, on the CPU."""
    on_the_cpu(monkeypatch)
    config = resolved(service_config(kind, drafter=drafter))
    worker, runner = bare_worker(config), object.__new__(GPUModelRunner)
    worker.model_runner, runner.device = runner, CPU
    runner.sampler, runner.rejection_sampler = samplers(config, STREAMS, law.VOCABULARY)
    runner.speculator = speculator(config) if kind != "none" else None
    return worker


@pytest.mark.parametrize("kind", SPECULATORS)
def test_every_kind_of_drafter_has_a_speculator_of_its_own(monkeypatch, kind):
    made = running_worker(monkeypatch, kind).model_runner.speculator
    assert type(made).__name__ == SPECULATORS[kind]
    assert isinstance(made, DraftModelSpeculator) == (kind != "ngram")


@pytest.mark.parametrize(
    ("kind", "drafter", "said"),
    [
        ("none", {}, {}),
        ("mtp", {}, {"draft_sampling": "probabilistic", "verification": "standard (vLLM)"}),
        ("eagle3", {"draft_sampling": "greedy"}, {"draft_sampling": "greedy", "verification": "standard (vLLM)"}),
        ("draft_model", {"verification": "block"}, {"draft_sampling": "probabilistic", "verification": "block (vLLM)"}),
        ("ngram", {"verification": "block"}, {"draft_sampling": "greedy", "verification": "block (vLLM)"}),
    ],
)
def test_the_worker_says_how_drafts_are_sampled_and_verified(monkeypatch, kind, drafter, said):
    assert running_worker(monkeypatch, kind, **drafter).running() == said


def test_the_worker_switches_the_verification_of_the_real_verifier(monkeypatch):
    worker = running_worker(monkeypatch, "mtp")
    for verification, block in (("block", True), ("standard", False), ("block", True), ("auto", False)):
        worker.set_verification(verification)
        assert worker.model_runner.rejection_sampler.use_block_verification == block
        assert worker.running()["verification"].startswith("block" if block else "standard")


def test_the_runner_gives_the_drafters_model_to_updates(monkeypatch):
    worker = running_worker(monkeypatch, "mtp")
    worker.model_runner.speculator.model = model = SimpleNamespace()
    assert worker.get_draft_model() is model


FEWER = {"ROWS": 400, "REQUESTS": 250}
"""of law's draws, since the interpreter takes some milliseconds for each"""


@pytest.fixture
def _fewer(monkeypatch):
    for name, count in FEWER.items():
        monkeypatch.setattr(law, name, count)


@pytest.mark.usefixtures("_fewer")
def test_the_test_that_an_engine_makes_at_its_start_passes_with_vllms_kernels(monkeypatch):
    running_worker(monkeypatch, "mtp").check_law()


@pytest.mark.parametrize(("wrong", "largest"), [(False, law.LIMIT), (True, torch.inf)])
def test_that_test_notices_a_verifier_that_accepts_every_draft(monkeypatch, wrong, largest):
    face = running_worker(monkeypatch, "mtp").face
    verify = face.verify

    def lenient(target_RKV, draft_KV, drafts_RK, *how):
        return torch.cat([drafts_RK, verify(target_RKV, draft_KV, drafts_RK, *how).max(1).values[:, None]], 1)

    if wrong:
        monkeypatch.setattr(face, "verify", lenient)
    random = torch.Generator().manual_seed(2)
    logits_KV = torch.rand(3, law.VOCABULARY, generator=random) * 3
    draft_KV = logits_KV[:-1] + torch.randn(2, law.VOCABULARY, generator=random)
    by = law.verification_deviation(face, logits_KV, draft_KV, draft_KV, "standard", FEWER["REQUESTS"])
    assert law.LIMIT * wrong <= by < largest


def test_products_of_float32_matrices_are_compared_with_float64():
    assert largest_error("cpu") < 1e-5


def test_what_is_wrong_or_lacking_on_a_gpu_is_replaced_when_vllm_loads_the_plugin():
    resolved(service_config("none"))
    assert {*APPLIED} == {patch.name for patch in (*DEFECTS_ON_A_GPU, *AT_LOADING)}
    assert apply_patches() == []


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name.removeprefix("vllm."))
def test_every_patch_was_written_for_the_functions_of_this_wheel(patch):
    patch.check()

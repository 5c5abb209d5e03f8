"""Both model runners of vLLM: what an engine is started with on each, and what the service touches of the GPU's."""

import ast
import inspect
import textwrap
from pkgutil import resolve_name
from types import SimpleNamespace

import pytest
import torch

from drafters.registry import KINDS, DrafterConfig, make_drafter
from rollout_service.config import ServiceConfig
from rollout_service.engine.arguments import check_runner, engine_arguments
from rollout_service.engine.graph_sizes import LARGEST, capture_sizes, every_length
from rollout_service.engine.switches import check_switches, started_as
from rollout_service.vllm_plugin import draft_model_length, face_v2, graph_dispatch
from rollout_service.vllm_plugin.face import face_of
from rollout_service.vllm_plugin.face_v2 import CALLED, USED, FaceV2


def drafter(kind, **more):
    model = {"model": "m"} if KINDS[kind].has_folder else {}
    return DrafterConfig(kind=kind, **model, **more)


def arguments(kind, device, lengths=None, engine=None, **more):
    config = ServiceConfig(model="m", drafter=drafter(kind, **more), engine={"max_num_seqs": 32, **(engine or {})})
    return engine_arguments(config, "m", device, draft_lengths=lengths)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
def test_each_kind_has_its_name_on_each_runner(kind):
    methods = {device: arguments(kind, device).speculative_config["method"] for device in ("cpu", "cuda")}
    assert methods == {"cpu": kind, "cuda": "ngram_gpu" if kind == "ngram" else kind}
    on = make_drafter(drafter(kind)).on
    assert on["v2"].rests == (kind == "ngram"), "a model runs its first forward pass where nothing is drafted"
    assert (on["v1"].fills, on["v2"].fills) == (kind != "ngram", True)


@pytest.mark.parametrize(("device", "expected"), [("cpu", None), ("cuda", "block")])
def test_only_a_gpu_engine_is_started_with_vllms_block_verification(device, expected):
    given = arguments("mtp", device, verification="block").speculative_config
    assert given.get("rejection_sample_method") == expected
    assert "rejection_sample_method" not in arguments("mtp", device).speculative_config


def test_a_gpu_engine_gets_sizes_of_graphs_for_every_draft_length_unless_the_user_chooses_them():
    lengths = every_length(3, 32)
    assert {length for _, _, length in lengths} == {0, 1, 2, 3}
    assert {k * 32 for k in (1, 2, 3, 4)} <= set(arguments("mtp", "cuda", lengths).cudagraph_capture_sizes)
    assert arguments("mtp", "cpu", lengths).cudagraph_capture_sizes is None
    assert arguments("mtp", "cuda").cudagraph_capture_sizes is None, "of a single length vLLM's own are right"
    own = {"vllm": {"cudagraph_capture_sizes": [8]}}
    assert arguments("mtp", "cuda", lengths, own).cudagraph_capture_sizes == [8]
    assert arguments("none", "cuda", lengths).cudagraph_capture_sizes is None


@pytest.mark.parametrize(("draft_tokens", "batches"), [(1, 1), (3, 1), (3, 2), (3, 64), (16, 8)])
def test_the_first_schedule_has_every_length_that_fits_and_ends_with_the_longest(draft_tokens, batches):
    lengths = every_length(draft_tokens, batches)
    assert len({length for _, _, length in lengths}) == min(draft_tokens + 1, batches)
    assert lengths[-1][1:] == (batches, draft_tokens)
    assert [first for first, _, _ in lengths] == list(range(1, len(lengths) + 1))


@pytest.mark.parametrize(
    ("draft_tokens", "batches"), [(1, 3), (2, 32), (3, 64), (3, 100), (5, 48), (7, 64), (7, 100), (1, 600)]
)
def test_steps_of_every_length_find_a_full_graph(draft_tokens, batches, monkeypatch):
    """Computed from vLLM's own tables. Without the patch many steps find none, with the same sizes."""
    lengths, sizes = every_length(draft_tokens, batches), capture_sizes(batches, range(draft_tokens + 1))

    def missed():
        made = graph_dispatch.manager(batches, lengths, sizes, draft_tokens)
        return {(b, k) for b, k in graph_dispatch.missed(made, batches, draft_tokens) if b * (k + 1) <= LARGEST}

    stock = resolve_name(graph_dispatch.NAME)
    monkeypatch.setattr(graph_dispatch.NAME, stock)  # undone afterwards
    before = missed()
    graph_dispatch.let_every_length_find_its_graph()
    assert missed() == set()
    assert before or draft_tokens == 1  # every even number is a multiple of 2


def test_few_graphs_are_captured():
    """Each takes some of the start and of the memory: vLLM's own sizes for one length are about 50."""
    made = graph_dispatch.manager(64, every_length(3, 64), capture_sizes(64, range(4)), 3)
    assert sum(len(graphs) for graphs in made._capture_descs.values()) < 160


def test_a_draft_model_drafts_as_long_as_asked_on_a_gpu(monkeypatch):
    monkeypatch.setattr(draft_model_length.NAME, resolve_name(draft_model_length.NAME))
    assert not draft_model_length.drafts_as_long_as_asked()
    draft_model_length.draft_as_long_as_asked()
    assert draft_model_length.drafts_as_long_as_asked()


@pytest.mark.parametrize(("device", "chosen"), [("cpu", True), ("cuda", False)])
def test_the_other_runner_is_refused_before_the_engine_starts(device, chosen):
    check_runner(SimpleNamespace(use_v2_model_runner=not chosen), device)
    with pytest.raises(ValueError, match=f"engine.device: on {device} the service needs vLLM's V"):
        check_runner(SimpleNamespace(use_v2_model_runner=chosen), device)


def test_engines_are_shared_by_what_their_runner_can_switch():
    ways = [
        drafter("mtp", draft_sampling=sampling, verification=verification)
        for sampling in ("probabilistic", "greedy")
        for verification in ("standard", "block")
    ]
    assert len({started_as(way, "v1").model_dump_json() for way in ways}) == 1
    assert len({started_as(way, "v2").model_dump_json() for way in ways}) == 2
    greedy, plain = drafter("ngram", draft_sampling="greedy"), drafter("ngram")
    assert started_as(greedy, "v2") == started_as(plain, "v2"), "deterministic drafts are sampled in one way"


def test_what_a_runner_cannot_switch_is_refused_by_its_field():
    sampled, greedy = drafter("mtp"), drafter("mtp", draft_sampling="greedy")
    check_switches(sampled, greedy, "v1")
    check_switches(sampled, drafter("mtp", verification="block"), "v2")
    check_switches(drafter("ngram"), drafter("ngram", draft_sampling="greedy"), "v2")
    with pytest.raises(ValueError, match=r'draft_sampling: .* V2 .* started with "probabilistic" cannot .* "greedy"'):
        check_switches(sampled, greedy, "v2")


@pytest.mark.parametrize("constructor", USED)
def test_vllms_constructors_set_what_the_face_reads(constructor):
    tree = ast.parse(textwrap.dedent(inspect.getsource(resolve_name(constructor))))
    attributes = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }
    assert set(USED[constructor]) <= attributes


@pytest.mark.parametrize("function", CALLED)
def test_vllms_functions_take_what_the_face_gives(function):
    assert ", ".join(inspect.signature(resolve_name(function)).parameters) == CALLED[function]


def test_the_face_touches_nothing_else_of_vllms():
    """So that USED and CALLED are complete."""
    known = {name for names in USED.values() for name in names} | {name.rpartition(".")[2] for name in CALLED}
    text = inspect.getsource(face_v2)
    touched = {
        node.attr
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute)
        and ast.unparse(node.value).split(".")[-1] in ("runner", "sampler", "speculator", "rejection_sampler")
    }
    assert touched <= known


class Worker(SimpleNamespace):
    """In place of vLLM's worker on a GPU, with a drafter that samples."""

    use_v2_model_runner = True

    def __init__(self, draft_logits):
        super().__init__(
            model_config=SimpleNamespace(dtype=torch.bfloat16),
            vllm_config=SimpleNamespace(speculative_config=SimpleNamespace(num_speculative_tokens=3)),
            model_runner=SimpleNamespace(
                speculator=SimpleNamespace(draft_logits=draft_logits),
                rejection_sampler=SimpleNamespace(use_block_verification=False),
            ),
        )


@pytest.mark.parametrize(("logits", "drafts"), [(None, "greedy"), (torch.zeros(1), "probabilistic")])
def test_verification_is_switched_live_on_a_gpu_and_reported_as_it_is(logits, drafts):
    worker = Worker(logits)
    face = face_of(worker)
    assert isinstance(face, FaceV2)
    for asked, runs in (("auto", "standard (vLLM)"), ("block", "block (vLLM)"), ("standard", "standard (vLLM)")):
        face.set_verification(asked)
        assert worker.model_runner.rejection_sampler.use_block_verification == (asked == "block")
        assert face.running() == {"draft_sampling": drafts, "verification": runs}
    worker.vllm_config.speculative_config = None
    assert face_of(worker).running() == {}

"""CUDA graphs: which batch sizes and draft lengths find a full graph, from vLLM's own tables of graphs.

vLLM makes the tables before it captures anything, so they need no GPU. A step of b requests with k drafts each has
b (k + 1) tokens.
"""

from types import SimpleNamespace

import pytest
import torch
from resolved import DRAFT_TOKENS, STREAMS, resolved, service_config
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
from vllm.v1.worker.utils import get_uniform_decode_token_count

from rollout_service.engine.graph_sizes import LARGEST
from rollout_service.vllm_plugin.graph_dispatch import NAME
from rollout_service.vllm_plugin.table import STOCK

KINDS = ("mtp", "eagle3", "draft_model", "ngram")
DEFAULT_SIZES = {"vllm": {"compilation_config": {}}}
"""an argument by which a user chooses the sizes, so that the service leaves them to vLLM"""


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """With one GPU, every rank is the first and the last. vLLM asks a group of processes, and here is none."""
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: SimpleNamespace(is_first_rank=True, is_last_rank=True))


@pytest.fixture
def _stock(monkeypatch):
    """vLLM's own search for a graph."""
    resolved(service_config("mtp"))  # vLLM loads the service's plugin
    monkeypatch.setattr(CudaGraphManager, "_init_candidates", STOCK[NAME])


def without_a_graph(config, manager_class=cudagraph_utils.ModelCudaGraphManager):
    """By draft length, the batch sizes of decoding steps that find no full graph; of up to 512 tokens."""
    longest, streams = config.speculative_config.num_speculative_tokens, config.scheduler_config.max_num_seqs
    mode = config.compilation_config.cudagraph_mode
    manager = manager_class(config, torch.device("cuda"), mode, longest + 1)
    manager._graphs_captured = True  # as after the capture of all that the tables list
    missed = {}
    for k in range(longest + 1):
        missed[k] = []
        for batch in range(1, min(streams, LARGEST // (k + 1)) + 1):
            tokens = batch * (k + 1)
            each = get_uniform_decode_token_count(batch, tokens, k + 1, True)
            if manager.dispatch(batch, tokens, each, 0, max_query_len=k + 1).cg_mode != CUDAGraphMode.FULL:
                missed[k].append(batch)
    return missed


@pytest.mark.parametrize("kind", KINDS)
def test_every_draft_length_finds_a_full_graph_at_every_batch_size(kind):
    assert without_a_graph(resolved(service_config(kind))) == {k: [] for k in range(DRAFT_TOKENS + 1)}


@pytest.mark.parametrize(("streams", "draft_tokens"), [(64, 3), (100, 4), (256, 1), (33, 7), (2, 5)])
def test_every_draft_length_finds_a_full_graph_with_other_numbers_of_streams_and_drafts(streams, draft_tokens):
    config = resolved(service_config("mtp", max_num_seqs=streams, drafter={"draft_tokens": draft_tokens}))
    first = max(0, draft_tokens + 1 - streams)  # a schedule has a length for each batch size, so no more than those
    assert {k: batches for k, batches in without_a_graph(config).items() if k >= first and batches} == {}


def test_the_drafters_first_pass_finds_a_full_graph_at_every_draft_length():
    from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import SpeculatorCudaGraphManager

    missed = without_a_graph(resolved(service_config("mtp")), SpeculatorCudaGraphManager)
    assert missed == {k: [] for k in range(DRAFT_TOKENS + 1)}


@pytest.mark.usefixtures("_stock")
def test_vllm_alone_misses_graphs_with_its_default_sizes():
    missed = without_a_graph(resolved(service_config("mtp", **DEFAULT_SIZES)))
    assert {k: len(batches) for k, batches in missed.items()} == {0: 5, 1: 3, 2: 14, 3: 0}


@pytest.mark.usefixtures("_stock")
def test_vllm_alone_misses_graphs_with_our_sizes_too():
    """It looks only at the next larger number of tokens, which may be of another draft length."""
    missed = without_a_graph(resolved(service_config("mtp")))
    assert sum(map(len, missed.values())) > 0


@pytest.mark.usefixtures("_stock")
def test_vllm_alone_captures_nothing_for_draft_lengths_that_the_first_schedule_lacks():
    config = resolved(service_config("mtp", **DEFAULT_SIZES))
    config.speculative_config.num_speculative_tokens_per_batch_size = [(1, STREAMS, DRAFT_TOKENS)]
    everything = list(range(1, STREAMS + 1))
    assert without_a_graph(config) == {0: everything, 1: everything, 2: everything, DRAFT_TOKENS: []}


def test_eager_engines_have_no_graphs():
    missed = without_a_graph(resolved(service_config("mtp", enforce_eager=True)))
    assert all(batches == list(range(1, STREAMS + 1)) for batches in missed.values())

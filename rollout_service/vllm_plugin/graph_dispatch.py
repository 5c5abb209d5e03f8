"""Graph dispatch: on a GPU, a step of any draft length runs the next larger CUDA graph that was captured for it.

vLLM's V2 runner captures full graphs for each draft length k of its schedule, of n (k + 1) tokens. For a step it looks
only at the graphs of the next larger number of tokens, whatever their length. If none of those is of the step's length,
the step runs without a full graph, though a larger one of its length exists.
"""

from types import SimpleNamespace
from typing import Any

from rollout_service.vllm_plugin.patch import Patch

NAME = "vllm.v1.worker.gpu.cudagraph_utils.CudaGraphManager._init_candidates"


def let_every_length_find_its_graph() -> None:
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    stock = CudaGraphManager._init_candidates

    def _init_candidates(self: Any) -> None:
        stock(self)
        # Full graphs before piecewise ones, and small ones before large ones, as in vLLM's own lists.
        modes = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE
        graphs = [graph for mode in modes for graph in reversed(self._capture_descs.get(mode, []))]
        for tokens, loras in self._candidates:
            smallest: dict[Any, Any] = {}
            for graph in graphs:
                if graph.num_tokens >= tokens and graph.num_active_loras == loras:
                    kind = graph.cg_mode, graph.uniform_token_count, graph.max_query_len, graph.num_ubatches
                    smallest.setdefault(kind, graph)
            self._candidates[tokens, loras] = list(smallest.values())

    CudaGraphManager._init_candidates = _init_candidates  # type: ignore[method-assign]


def manager(batches: int, draft_lengths: list[Any], sizes: list[int], draft_tokens: int) -> Any:
    """vLLM's manager of graphs, without a GPU, as if all were captured. `draft_lengths`: ranges of the schedule that
    vLLM starts with."""
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    made: Any = object.__new__(CudaGraphManager)
    speculation = SimpleNamespace(
        num_speculative_tokens_per_batch_size=draft_lengths, uses_dynamic_speculative_decoding=lambda: True
    )
    made.vllm_config = SimpleNamespace(
        speculative_config=speculation,
        num_speculative_tokens=draft_tokens,
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
    )
    made.compilation_config = SimpleNamespace(cudagraph_capture_sizes=sizes, max_cudagraph_capture_size=max(sizes))
    made.cudagraph_mode, made.decode_query_len = CUDAGraphMode.FULL_AND_PIECEWISE, draft_tokens + 1
    made.max_num_reqs, made.varlen_decode, made.ubatch_runner = batches, False, None
    made.lora_capture_cases, made._lora_dispatch_map, made._max_lora_case = [0], {}, 0
    made._candidates, made._capture_descs, made._graphs_captured = {}, {}, True
    made._init_candidates()
    return made


def missed(made: Any, batches: int, draft_tokens: int) -> list[tuple[int, int]]:
    """The (batch size, draft length) whose decoding steps run without a full graph."""
    from vllm.config.compilation import CUDAGraphMode

    return [
        (batch, drafts)
        for batch in range(1, batches + 1)
        for drafts in range(draft_tokens + 1)
        if made.dispatch(batch, batch * (drafts + 1), drafts + 1, 0, drafts + 1).cg_mode != CUDAGraphMode.FULL
    ]


def every_length_finds_its_graph() -> bool:
    """With a schedule of the lengths 0 to 2 and sizes that are multiples of 1 to 3, every step of up to 8 completions
    finds a graph."""
    sizes = sorted({n * k for n in (1, 2, 4, 8) for k in (1, 2, 3)})
    return not missed(manager(8, [(1, 1, 0), (2, 2, 1), (3, 8, 2)], sizes, 2), 8, 2)


GRAPH_DISPATCH = Patch(
    NAME,
    "it offers a step only the graphs of the next larger number of tokens. If these are of other draft lengths, the "
    "step runs without a full graph",
    when="on a GPU when the plugin is loaded, if it fails its self-test",
    unneeded="it passes its self-test",
    apply=let_every_length_find_its_graph,
    is_right=every_length_finds_its_graph,
    relies_on={
        NAME: "self",
        "vllm.v1.worker.gpu.cudagraph_utils.CudaGraphManager.dispatch": (
            "self, num_reqs, num_tokens, uniform_token_count, num_active_loras, max_query_len, num_ubatches"
        ),
    },
    looked_up_in={"vllm.v1.worker.gpu.cudagraph_utils.CudaGraphManager.dispatch": "_candidates"},
)

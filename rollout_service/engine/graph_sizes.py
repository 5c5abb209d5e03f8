"""Sizes of CUDA graphs: for how many tokens vLLM captures them, so that steps of every draft length find one."""

from collections.abc import Iterable

from drafters.schedule import Range

LARGEST = 512
"""tokens; vLLM's own largest size. Larger steps keep a GPU busy without a graph of the whole model"""
COARSE = 32
"""tokens between the sizes beyond those of decoding steps, for steps with prompts in them"""


def every_length(draft_tokens: int, batches: int) -> list[Range]:
    """A schedule in which every draft length from 0 to `draft_tokens` occurs, because vLLM captures graphs for the
    lengths of the schedule that it starts with. If there are fewer batch sizes than lengths, the shortest are missing.
    """
    lengths = range(max(0, draft_tokens + 1 - batches), draft_tokens + 1)
    *others, longest = enumerate(lengths, start=1)
    return [*((batch, batch, length) for batch, length in others), (longest[0], batches, longest[1])]


def capture_sizes(batches: int, draft_lengths: Iterable[int]) -> list[int]:
    """Numbers of tokens to capture graphs for: multiples of k + 1 for every draft length k, up to `batches` times it.

    Between two sizes of a draft length a step takes the next larger one (vllm_plugin/graph_dispatch.py).
    """
    decoding = set()
    for k in draft_lengths:
        most = min(batches, LARGEST // (k + 1))
        counts = (1, 2, 4, *range(8, 256, 8), *range(256, LARGEST, 16))
        decoding |= {n * (k + 1) for n in (*counts, most) if n <= most}
    return sorted(decoding | {*range(max(decoding) + COARSE, LARGEST + 1, COARSE)})

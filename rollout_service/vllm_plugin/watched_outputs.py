"""Watched outputs: what the engine gave to each request on vLLM's own routes, seen beside the handler that reads it.

vLLM's handlers leave out what they were not asked for, such as the versions of the weights on `/v1/completions`. A
request that wants a record of its sampling says so in WATCHED. Every call of `llm.generate` under it then collects, by
choice, what the engine sampled. Outside of vLLM's routes WATCHED is not set, and `llm.generate` is vLLM's own.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rollout_service.vllm_plugin.patch import Patch

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput

NAME = "vllm.v1.engine.async_llm.AsyncLLM.generate"


@dataclass
class Sampled:
    """All tokens of one choice, also when vLLM gave them in pieces, and the log-probability of each."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def add(self, output: "CompletionOutput") -> None:
        self.token_ids += output.token_ids
        self.logprobs += sampled_logprobs(output)


@dataclass
class Watched:
    """One request on vLLM's routes. With `recorded`, its choices are collected."""

    recorded: bool = False
    n: int = 1
    """choices for each prompt"""
    calls: list[dict[int, Any]] = field(default_factory=list)
    """for each call of `llm.generate`, in order: what `finished` returned for each choice, by its index"""


WATCHED: ContextVar[Watched | None] = ContextVar("watched", default=None)
"""the request on vLLM's routes that this task belongs to"""


def sampled_logprobs(output: "CompletionOutput") -> list[float]:
    """The log-probability of each sampled token of an output that has log-probabilities, flat or not."""
    from vllm.logprobs import FlatLogprobs

    if isinstance(output.logprobs, FlatLogprobs):  # the sampled token is the first of its position
        return [output.logprobs.logprobs[start] for start in output.logprobs.start_indices]
    assert output.logprobs is not None
    return [place[token].logprob for token, place in zip(output.token_ids, output.logprobs, strict=True)]


def with_logprobs(params: Any) -> Any:
    """Sampling parameters that also report the sampled tokens' log-probabilities. The handler's own parameters stay as
    they are, because it reads from them what it was asked for."""
    if params.logprobs is not None:
        return params
    params = params.clone()
    params.logprobs = 0
    params.flat_logprobs = (
        params.prompt_logprobs is None
    )  # it holds for those of the prompt too, which the handler reads
    return params


def watch_outputs(llm: Any, finished: Callable[[list[int], "CompletionOutput", Sampled | None], Any]) -> None:
    """From now on `finished` is called with the prompt's tokens, the last output, and what was sampled (None unless
    recorded) for each choice that ends on vLLM's routes. Its result is kept in `Watched.calls`."""
    generate = llm.generate

    def watched(prompt: Any, params: Any, *arguments: Any, **more: Any) -> AsyncIterator[Any]:
        request = WATCHED.get()
        if request is None:
            return generate(prompt, params, *arguments, **more)
        if request.recorded:
            params = with_logprobs(params)
        choices: dict[int, Any] = {}
        request.n = params.n
        request.calls.append(choices)
        return observed(generate(prompt, params, *arguments, **more), request.recorded, choices)

    async def observed(outputs: Any, recorded: bool, choices: dict[int, Any]) -> AsyncIterator[Any]:
        sampled: dict[int, Sampled] = {}
        async with aclosing(outputs):  # closing it ends the generation
            async for output in outputs:
                for choice in output.outputs:
                    if recorded:
                        sampled.setdefault(choice.index, Sampled()).add(choice)
                    if choice.finish_reason is not None:
                        choices[choice.index] = finished(
                            output.prompt_token_ids, choice, sampled.get(choice.index)
                        )  # fmt: skip
                yield output

    llm.generate = watched


WATCHED_OUTPUTS = Patch(
    NAME,
    "handlers that read its outputs leave out weight versions, draft steps and, unless asked, log-probabilities",
    when="on the engine's own object, on every device, for requests on vLLM's routes",
    unneeded="vLLM's routes answer with each choice's tokens, log-probabilities, weight versions and draft steps",
    apply=watch_outputs,
    shown_by="tests/integration/test_rollout_record.py::test_a_record_says_what_rollouts_say_for_the_same_seed",
    relies_on={NAME: "self, prompt, sampling_params, ..."},
)

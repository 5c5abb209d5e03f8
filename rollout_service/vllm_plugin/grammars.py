"""Grammars beside drafts: refused where vLLM sets one itself, for a request that did not ask for one.

Requests that ask for a grammar are refused before they reach an engine (rollout_service/lossless.py). Some of vLLM's
tool parsers set one for every request with tools, such as those of GLM and of Mistral.
"""

from collections.abc import AsyncIterator
from typing import Any

from rollout_service.vllm_plugin.patch import Patch

NAME = "vllm.v1.engine.async_llm.AsyncLLM.generate"
MESSAGE = (
    "vLLM's parser of tool calls or of reasoning sets a grammar for this request, and a grammar rejects some drafted "
    "tokens, which the CPU engine's sampler cannot handle; send tool_choice none, or serve without a drafter"
)


def refuse_grammars(llm: Any) -> None:
    """From now on `llm.generate` raises VLLMValidationError for a request with structured outputs, which the routes
    answer with 400."""
    generate = llm.generate

    def without_grammar(prompt: Any, sampling_params: Any, *arguments: Any, **more: Any) -> AsyncIterator[Any]:
        if getattr(sampling_params, "structured_outputs", None) is not None:
            from vllm.exceptions import VLLMValidationError

            raise VLLMValidationError(MESSAGE, parameter="tools")
        outputs: AsyncIterator[Any] = generate(prompt, sampling_params, *arguments, **more)
        return outputs

    llm.generate = without_grammar


GRAMMARS = Patch(
    NAME,
    "with a drafter on a CPU, a grammar that a parser of vLLM sets would change what drafts let through",
    when="on the engine's own object, on a CPU with a drafter, once vLLM's routes are used",
    unneeded="vLLM's sampler on a CPU applies grammars to drafted tokens",
    apply=refuse_grammars,
    shown_by="tests/integration/test_tools.py::test_a_grammar_that_a_parser_sets_is_refused_beside_drafts",
    relies_on={NAME: "self, prompt, sampling_params, ..."},
)

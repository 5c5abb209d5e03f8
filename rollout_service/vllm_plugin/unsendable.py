"""Unsendable requests are the client's error: vLLM's core takes neither numbers over 64 bits nor lone surrogates."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from rollout_service.vllm_plugin.patch import Patch

NAME = "vllm.v1.engine.async_llm.AsyncLLM.generate"


def refuse_what_cannot_be_sent(llm: Any) -> None:
    """From now on `llm.generate` raises VLLMValidationError for a request that cannot be sent, which the routes answer
    with 400. vLLM's own EngineGenerateError does not say why. The causes are those that vLLM's handlers attribute to
    the client."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.exceptions import EngineGenerateError

    generate = llm.generate

    def judged(*arguments: Any, **more: Any) -> AsyncIterator[Any]:
        return outputs_of(generate(*arguments, **more))  # called at once, as vLLM's own is

    async def outputs_of(outputs: Any) -> AsyncIterator[Any]:
        async with aclosing(outputs):  # closing it ends the generation
            try:
                async for output in outputs:
                    yield output
            except EngineGenerateError as error:
                if isinstance(error.__cause__, ValueError | TypeError | OverflowError):
                    raise VLLMValidationError(str(error.__cause__)) from error
                raise

    llm.generate = judged


UNSENDABLE = Patch(
    NAME,
    "it raises EngineGenerateError, which the routes answer with 500, for a request that cannot be sent to the core",
    when="on the engine's own object, on every device, once vLLM's routes are used",
    unneeded="vLLM's routes answer such a request with 400",
    apply=refuse_what_cannot_be_sent,
    shown_by="tests/integration/test_service.py::test_what_cannot_be_sent_to_vllms_core_is_a_wrong_request",
    relies_on={NAME: "self, prompt, ..."},
)

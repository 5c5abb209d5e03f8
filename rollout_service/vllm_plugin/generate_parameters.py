"""Requests to /inference/v1/generate: within the context, without text that nobody reads, and without wrong media.

- vLLM cuts `max_tokens` to the room after the prompt on /v1/completions, and not here. A response would then go on into
  the positions that are kept free for a drafter to look ahead.
- vLLM fails on images for a policy that reads only text.
- In the answer's mode "tokens" vLLM decodes every token and leaves the text out. Only stop strings need it, and the
  texts beside the prompt's log-probabilities.
"""

from typing import Any

from rollout_service.vllm_plugin.patch import Patch

NAME = "vllm.entrypoints.scale_out.token_in_token_out.serving.ServingTokens.serve_tokens"


def adapt_parameters(handler: Any) -> None:
    """From now on this handler adapts the parameters of each request, and refuses what it cannot generate from."""
    from vllm.exceptions import VLLMValidationError

    stock = handler.serve_tokens

    async def serve_tokens(request: Any, raw_request: Any = None) -> Any:
        length, limit = len(request.token_ids), handler.model_config.max_model_len
        if length >= limit:
            message = f"has {length} tokens, too many: prompt and response together may have {limit}"
            raise VLLMValidationError(message, parameter="token_ids")
        media = "features" if request.features else "content_parts" if request.content_parts else None
        if media and not handler.model_config.is_multimodal_model:
            text_only = "this policy reads text only; leave images and other media out"
            raise VLLMValidationError(text_only, parameter=media)
        adapt(request.sampling_params, limit - length, with_text=request.output_mode != "tokens")
        return await stock(request, raw_request)

    handler.serve_tokens = serve_tokens


def adapt(params: Any, room: int, with_text: bool) -> None:
    """`room`: tokens that the response may have. `with_text`: whether the answer has the response's text."""
    if params.max_tokens is not None:
        params.max_tokens = min(params.max_tokens, room)
    if not with_text and params.prompt_logprobs is None:
        params.flat_logprobs = True
        params.detokenize = bool(params.stop)


GENERATE_PARAMETERS = Patch(
    NAME,
    "it lets a response grow past the context that is left. It decodes tokens whose text it leaves out, and fails on "
    "media for a policy that reads only text",
    when="on the handler's own object, on every device, once vLLM's routes are used",
    unneeded="it cuts max_tokens to the room after the prompt, refuses such media, and does not decode for token ids",
    apply=adapt_parameters,
    shown_by="tests/integration/test_generate.py::test_a_response_ends_where_the_context_does",
    relies_on={NAME: "self, request, raw_request"},
)

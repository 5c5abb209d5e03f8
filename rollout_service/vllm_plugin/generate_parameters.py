"""Parameters of /inference/v1/generate: as long as on vLLM's other routes, and without text that nobody reads.

- vLLM cuts `max_tokens` to the room after the prompt on /v1/completions, and not here. A response would then go on into
  the positions that are kept free for a drafter to look ahead.
- In the answer's mode "tokens" vLLM decodes every token and leaves the text out. Only stop strings need it, and the
  texts beside the prompt's log-probabilities.
"""

from typing import Any

from rollout_service.vllm_plugin.patch import Patch

NAME = "vllm.entrypoints.scale_out.token_in_token_out.serving.ServingTokens.serve_tokens"


def adapt_parameters(handler: Any) -> None:
    """From now on this handler adapts the parameters of each request, and refuses a prompt that leaves no room."""
    stock = handler.serve_tokens

    async def serve_tokens(request: Any, raw_request: Any = None) -> Any:
        limit, room = handler.model_config.max_model_len, handler.model_config.max_model_len - len(request.token_ids)
        if room < 1:
            message = f"has {len(request.token_ids)} tokens, too many: prompt and response together may have {limit}"
            return handler.create_error_response(f"token_ids: {message}", param="token_ids")
        adapt(request.sampling_params, room, with_text=request.output_mode != "tokens")
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
    "it lets a response grow past the context that is left for it, and decodes tokens whose text it leaves out",
    when="on the handler's own object, on every device, once vLLM's routes are used",
    unneeded="it cuts max_tokens to the room after the prompt, and does not decode in output_mode tokens",
    apply=adapt_parameters,
    shown_by="tests/integration/test_generate.py::test_a_response_ends_where_the_context_does",
    relies_on={NAME: "self, request, raw_request"},
)

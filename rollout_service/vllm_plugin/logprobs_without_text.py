"""Log-probabilities of rollouts, without the text of each token, which nobody reads.

vLLM decodes every sampled token a second time, by itself, to put its text beside its log-probability. That takes a
large part of the time to process an engine's output, in the process in front of the core. A rollout's log-probabilities
are flat (`SamplingParams.flat_logprobs`), and only their numbers are read. Those of vLLM's own routes keep their text.
"""

from types import SimpleNamespace
from typing import Any

from rollout_service.vllm_plugin.patch import Patch

NAME = "vllm.v1.engine.logprobs.LogprobsProcessor.from_new_request"


def leave_text_out_of_flat_logprobs() -> None:
    """Give vLLM's processor of log-probabilities no tokenizer if they are flat."""
    from vllm.v1.engine.logprobs import LogprobsProcessor

    stock = LogprobsProcessor.from_new_request

    def from_new_request(cls: Any, tokenizer: Any, request: Any) -> Any:
        return stock(None if request.sampling_params.flat_logprobs else tokenizer, request)

    LogprobsProcessor.from_new_request = classmethod(from_new_request)  # type: ignore[method-assign, assignment]


def flat_logprobs_have_no_text() -> bool:
    """Flat log-probabilities are processed without a tokenizer, and others with it."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.logprobs import LogprobsProcessor

    def has_tokenizer(flat: bool) -> bool:
        request: Any = SimpleNamespace(sampling_params=SamplingParams(logprobs=0, flat_logprobs=flat))
        tokenizer: Any = object()
        return LogprobsProcessor.from_new_request(tokenizer, request).tokenizer is tokenizer

    return has_tokenizer(flat=False) and not has_tokenizer(flat=True)


LOGPROBS_WITHOUT_TEXT = Patch(
    NAME,
    "it decodes each sampled token a second time for its text, which nobody reads in a rollout",
    when="when the plugin is loaded, on every device",
    unneeded="flat log-probabilities come without the tokens' texts",
    apply=leave_text_out_of_flat_logprobs,
    is_right=flat_logprobs_have_no_text,
    relies_on={NAME: "tokenizer, request"},
)

"""Log-probabilities of rollouts without the text of each token.

vLLM decodes every sampled token once more, alone, to put its text beside its log-probability, and takes 17 instead of
9 us a token to process an engine's output, in the process in front of the core. Of a rollout's log-probabilities, which
are flat (`SamplingParams.flat_logprobs`), only the numbers are read. Those of vLLM's own routes have their text.
"""

from typing import Any


def leave_flat_logprobs_undecoded() -> None:
    """Give vLLM's processor of log-probabilities no tokenizer where they are flat."""
    from vllm.v1.engine.logprobs import LogprobsProcessor

    stock = LogprobsProcessor.from_new_request
    if getattr(stock, "leaves_flat_undecoded", False):  # vLLM loads its plugins more than once in a process
        return

    def from_new_request(cls: Any, tokenizer: Any, request: Any) -> Any:
        return stock(None if request.sampling_params.flat_logprobs else tokenizer, request)

    from_new_request.leaves_flat_undecoded = True  # type: ignore[attr-defined]
    LogprobsProcessor.from_new_request = classmethod(from_new_request)  # type: ignore[method-assign, assignment]

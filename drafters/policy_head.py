"""PolicyHead: a policy's own map from hidden states to logits, apart from the rest of its forward pass.

The logits of a long batch take more memory than all its hidden states. transformers computes them at once; with its
decoder and this head they can be computed for some tokens at a time.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


class _HiddenStates(tuple[Tensor]):
    """A decoder's output with hidden states alone: policies pass other fields on, which are all None."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


class PolicyHead:
    """The output head, and what scales or caps its logits in some architectures.

    `context` is entered for each call, such as autocast.
    """

    def __init__(self, policy: PreTrainedModel, context: Callable[[], AbstractContextManager[Any]] = nullcontext):
        self.policy, self.context = policy, context
        embeddings: Any = policy.get_output_embeddings()
        self.vocab_size: int = len(embeddings.weight)

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        """The logits (N, V) of the decoder's last hidden states. Gradients reach the weights of the head.

        The policy's forward pass runs with a decoder that returns these hidden states. So the logits are those of any
        architecture, without a list of what each does after its output head.
        """
        decoder: Any = self.policy.get_decoder()
        outputs = iter([_HiddenStates([hidden_ND[None]])])
        decoder.forward = lambda *_, **__: next(outputs)
        try:
            with self.context():
                logits_NV: Tensor = self.policy(inputs_embeds=hidden_ND[None], use_cache=False).logits[0]
        finally:
            del decoder.forward
        assert next(outputs, None) is None, f"{type(self.policy).__name__} did not call what get_decoder() returned"
        return logits_NV

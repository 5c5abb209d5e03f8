"""A small causal language model of the policy's vocabulary as a learner: it reads the tokens, nothing else."""

from torch import Tensor
from transformers import PreTrainedModel

from drafters.learners.learner import Learner, PolicyOutputs, shifted


class DraftModel(Learner):
    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def draft_logprobs(self, tokens_BT: Tensor, policy: PolicyOutputs, steps: int) -> list[Tensor]:
        """Given the tokens, each step's distribution is the model's own one further on: one forward makes all."""
        logprobs_BTV = self.model(input_ids=tokens_BT, use_cache=False).logits.float().log_softmax(-1)
        return [shifted(logprobs_BTV, j + 1) for j in range(steps)]

    def checkpoint(self) -> dict[str, Tensor]:
        return dict(self.model.state_dict())

    def load_checkpoint(self, tensors: dict[str, Tensor]) -> None:
        self.model.load_state_dict(tensors)

"""Learner: the policy, its optimiser, and the forward and backward over rollouts.

- The weights and the optimiser state are float32; `dtype` is that of the matrix products.
- The policy stays in evaluation mode, with gradient checkpointing too: no dropout, and nothing else that training mode
  turns on. What is trained is what the service samples from.
- Completions of a group share the computation of their prompt, where the policy can be packed (learner/packing.py).
- Logits are computed where they predict response tokens; padding apart, nowhere else.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from drafters.devices import choose_device
from drafters.scoring import TokenScores, score_tokens, token_logprobs
from rl_loop.batching import MicroBatch, Rollout
from rl_loop.config import TrainConfig
from rl_loop.learner.carried_tensors import Carried
from rl_loop.learner.gradient_checkpointing import recompute_layers
from rl_loop.learner.packed_attention import can_pack, packed_attention
from rl_loop.learner.packing import packed_batches
from rl_loop.learner.padding import padded_batches
from rl_loop.losses.kl import k3_divergence
from rl_loop.losses.policy_loss import Totals, policy_loss
from rl_loop.losses.terms import LossInput


@dataclass(frozen=True)
class Example:
    """A rollout as it is trained on. Log-probabilities are of its response tokens, at the sampling temperature."""

    rollout: Rollout
    advantage: float
    old_logprobs: Tensor
    """under the policy that the clipped ratio is taken to: the one before the step's first update"""
    reference_logprobs: Tensor | None = None
    """all examples of a step have them, or none"""
    weights: Tensor | None = None
    """of its tokens' loss terms, for tokens of another policy; all examples of a step have them, or none"""


@dataclass(frozen=True)
class UpdateMetrics:
    """Means over a step's optimiser updates."""

    loss: float
    grad_norm: float
    """before clipping"""
    clip_fraction: float
    policy_ratio: float
    """new policy to old"""
    policy_kl: float
    """from the old policy to the new one, while training on the step"""
    reference_kl: float
    """from the policy to the reference; 0 without one"""
    learning_rate: float


def load_policy(model: str | Path) -> PreTrainedModel:
    """Any causal LM of transformers, in float32, from a folder or by its Hugging Face name."""
    policy: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    # Nothing is generated with it. transformers would refuse to save sampling defaults that it finds inconsistent.
    policy.generation_config = GenerationConfig()
    return policy


class Learner:
    """Owns `policy`; `reference` is the frozen initial policy, for the KL term."""

    def __init__(
        self,
        config: TrainConfig,
        policy: PreTrainedModel,
        reference: PreTrainedModel | None = None,
        carried: Carried | None = None,
    ):
        """`carried`: what checkpoints take over from the policy's own."""
        self.config, self.carried = config, carried or Carried()
        self.holds_part_of_a_step = False
        """whether some updates of a step are made, and the others are not"""
        self.device = choose_device(config.device)
        self.policy = self._placed(policy)
        self.reference = None if reference is None else self._placed(reference).requires_grad_(False)
        self.packs = can_pack(policy)
        if config.gradient_checkpointing:
            recompute_layers(self.policy)
        self.optimiser = torch.optim.AdamW(
            self.policy.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )

    def _placed(self, model: PreTrainedModel) -> PreTrainedModel:
        return model.to(self.device).eval()  # type: ignore[arg-type]

    def logprobs(
        self, rollouts: Sequence[Rollout], after_forward: Callable[[MicroBatch], None] = lambda batch: None
    ) -> list[TokenScores]:
        """Of each rollout's response tokens under the policy as it samples. No gradient, on the CPU.

        `after_forward` is told each micro-batch whose forward is done.
        """
        return self._score(self.policy, rollouts, after_forward)

    def reference_logprobs(self, rollouts: Sequence[Rollout]) -> Sequence[Tensor | None]:
        """Of each rollout's response tokens under the reference, at the sampling temperature; Nones without one."""
        if self.reference is None:
            return [None] * len(rollouts)
        return [scores.logprobs for scores in self._score(self.reference, rollouts)]

    @torch.no_grad()
    def _score(
        self,
        model: PreTrainedModel,
        rollouts: Sequence[Rollout],
        after_forward: Callable[[MicroBatch], None] = lambda batch: None,
    ) -> list[TokenScores]:
        sampling = self.config.sampling
        by_row: dict[int, TokenScores] = {}
        for batch in self._microbatches(rollouts):
            with self._attention(model):
                logits_NV = self._logits(model, batch)
            scores = score_tokens(
                logits_NV,
                batch.responses_N,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
            )
            by_row.update(zip(batch.rows, scores.cpu().split(batch.lengths), strict=True))
            after_forward(batch)
        return [by_row[row] for row in range(len(rollouts))]

    def train(self, examples: Sequence[Example], *, step: int) -> UpdateMetrics:
        """`epochs` times `minibatches` updates on one step's examples. `step`, from 0, sets the learning rate and the
        order of minibatches."""
        learning_rate = self._set_learning_rate(step)
        updates = [
            self._update(minibatch)
            for epoch in range(self.config.epochs)
            for minibatch in self._minibatches(examples, step, epoch)
        ]
        self.holds_part_of_a_step = False
        means = {name: sum(update[name] for update in updates) / len(updates) for name in updates[0]}
        return UpdateMetrics(**means, learning_rate=learning_rate)

    def _update(self, examples: Sequence[Example]) -> dict[str, float]:
        """One optimiser update on the mean over the examples. Returns UpdateMetrics' fields."""
        tokens = sum(len(example.rollout.response_ids) for example in examples)
        totals = Totals(tokens, len(examples), self.config.sampling.max_tokens)
        # What has no advantage has no gradient either, unless there is a reference: it counts, but is spared the work.
        taught = [e for e in examples if e.advantage != 0.0 or e.reference_logprobs is not None]
        spared = tokens - sum(len(example.rollout.response_ids) for example in taught)
        sums = {
            "loss": 0.0,
            "clip_fraction": 0.0,
            "policy_ratio": spared / tokens,
            "policy_kl": 0.0,
            "reference_kl": 0.0,
        }
        self.optimiser.zero_grad()
        for batch in self._microbatches([example.rollout for example in taught]):
            terms = self._backward(batch, [taught[row] for row in batch.rows], totals)
            sums = {name: value + terms[name] for name, value in sums.items()}
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm)
        self.holds_part_of_a_step = True
        self.optimiser.step()
        return {**sums, "grad_norm": norm.item()}

    def _backward(self, batch: MicroBatch, examples: Sequence[Example], totals: Totals) -> dict[str, float]:
        """Adds the micro-batch's gradient; `examples` are its rows. Returns its part of the whole batch's means."""
        advantages_N = torch.tensor([e.advantage for e in examples]).repeat_interleave(torch.tensor(batch.lengths))
        old_logprobs_N = torch.cat([example.old_logprobs for example in examples])
        references = [e.reference_logprobs for e in examples if e.reference_logprobs is not None]
        weights = [example.weights for example in examples if example.weights is not None]
        with self._attention(self.policy):
            logits_NV = self._logits(self.policy, batch)
            logprobs_N = token_logprobs(logits_NV, batch.responses_N, self.config.sampling.temperature)
            terms = LossInput(
                logprobs_N,
                old_logprobs_N.to(self.device),
                advantages_N.to(self.device),
                batch.lengths,
            )
            weights_N = torch.cat(weights).to(self.device) if weights else None
            objective = policy_loss(self.config.loss, terms, totals, weights_N)
            loss, divergence = objective.loss, torch.zeros(())
            if references:
                divergence = k3_divergence(logprobs_N, torch.cat(references).to(self.device), tokens=totals.tokens)
                loss = loss + self.config.kl_coefficient * divergence
            loss.backward()
        parts = {**objective.metrics, "loss": loss, "reference_kl": divergence}
        return {name: part.item() for name, part in parts.items()}

    def _attention(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        return packed_attention(model) if self.packs else nullcontext()

    def _logits(self, model: PreTrainedModel, batch: MicroBatch) -> Tensor:
        """(N, V), at the places that predict the response tokens."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            return batch.logits(model)

    def _microbatches(self, rollouts: Sequence[Rollout]) -> Iterator[MicroBatch]:
        batches = packed_batches if self.packs else padded_batches
        for batch in batches(rollouts, self.config.max_tokens_per_microbatch):
            yield batch.to(self.device)

    def _minibatches(self, examples: Sequence[Example], step: int, epoch: int) -> list[list[Example]]:
        """Examples of each update: all of them, or equal random parts."""
        order, parts = list(examples), self.config.minibatches
        if parts > 1:
            random.Random(f"{self.config.seed} {step} {epoch}").shuffle(order)
        return [order[len(order) * part // parts : len(order) * (part + 1) // parts] for part in range(parts)]

    def _set_learning_rate(self, step: int) -> float:
        rising = min(1.0, (step + 1) / self.config.warmup_steps) if self.config.warmup_steps else 1.0
        learning_rate = self.config.learning_rate * rising
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate
        return learning_rate

    def checkpoint_tensors(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The policy under its checkpoint's names, as `save_pretrained` writes it: tied duplicates left out, experts
        that transformers holds fused as one tensor an expert."""
        own = remove_tied_weights_from_state_dict(dict(self.policy.state_dict()), self.policy)
        tensors = revert_weight_conversion(self.policy, own)
        return {name: t.detach().to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}

"""LocalLearner: the policy and its optimiser on one device, and the forward and backward passes over rollouts.

- Weights, gradients and the optimiser's state have `weights_dtype`. Matrix products are in `compute_dtype`: bfloat16
  products of float32 weights read them through copies (autocast).
- Logits are computed a chunk at a time (drafters/chunked_scoring.py), and scores and losses in float32.
- The policy stays in evaluation mode, also with gradient checkpointing. So there is no dropout, and the distribution
  that is trained is the one that the service samples from.
- The completions of a group share the computation of their prompt, if the policy can be packed (learner/packing.py).
- Logits are computed only where they predict response tokens, and routers are read only there. So each response token
  counts once, however rollouts are divided into micro-batches.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from operator import add
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

import drafters.latent_moe  # noqa: F401  (which transformers then knows)
from drafters.chunked_scoring import hidden_logprobs, score_hidden
from drafters.devices import choose_device
from drafters.expert_routing import Routing, find_routers, reading_routers
from drafters.learners.learner import reading_policy
from drafters.policy_head import PolicyHead
from drafters.scoring import TokenScores
from drafters.training.state import adamw_state, restore_adamw_state
from rl_loop.batching import MicroBatch, Rollout
from rl_loop.config import TrainConfig
from rl_loop.learner.carried_tensors import Carried
from rl_loop.learner.gradient_checkpointing import recompute_layers
from rl_loop.learner.packed_attention import can_pack, packed_attention
from rl_loop.learner.packing import packed_batches
from rl_loop.learner.padding import padded_batches
from rl_loop.learner.policy_learner import Example, HiddenStateReader, LossMetrics, PolicyLearner
from rl_loop.learner.router_replay import check_routers, replaying
from rl_loop.losses.kl import k3_divergence
from rl_loop.losses.policy_loss import Totals, policy_loss
from rl_loop.losses.terms import LossInput

OPTIMISER = "trainer/optimiser.safetensors"


def load_policy(model: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Any causal LM of transformers, from a folder or by its Hugging Face name."""
    policy: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    # The trainer does not generate, and transformers refuses to save sampling defaults that it finds inconsistent.
    policy.generation_config = GenerationConfig()
    return policy


def compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The dtype of matrix products, with "auto" resolved."""
    if config.dtype == "auto":
        in_bfloat16 = device.type == "cuda" or config.weights_dtype == "bfloat16"
        return torch.bfloat16 if in_bfloat16 else torch.float32
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32


class LocalLearner(PolicyLearner):
    """Owns and trains `policy`. `reference` is the frozen initial policy, for the KL term."""

    def __init__(
        self,
        config: TrainConfig,
        policy: PreTrainedModel,
        reference: PreTrainedModel | None = None,
        carried: Carried | None = None,
    ):
        """`policy` and `reference` have the dtype `config.weights_dtype`. `carried`: what checkpoints
        copy from those of the policy."""
        super().__init__(config)
        self.carried = carried or Carried()
        self.device = choose_device(config.device)
        self.compute_dtype = compute_dtype(config, self.device)
        self.policy = self._placed(policy)
        self.reference = None if reference is None else self._placed(reference).requires_grad_(False)
        self.packs = can_pack(policy)
        self.routers = find_routers(policy)
        self._routing: Routing | None = None
        if config.router_replay:
            check_routers(self.policy)
        if config.gradient_checkpointing:
            recompute_layers(self.policy)
        self.optimiser = torch.optim.AdamW(
            self.policy.parameters(),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            foreach=False,  # on a GPU, the update of all tensors at once takes a copy of the weights more
        )

    def _placed(self, model: PreTrainedModel) -> PreTrainedModel:
        return model.to(self.device).eval()  # type: ignore[arg-type]

    def logprobs(self, rollouts: Sequence[Rollout], reader: HiddenStateReader | None = None) -> list[TokenScores]:
        if reader is None:
            return self._score_and_route(rollouts)
        with reading_policy(self.policy, reader.layers) as reading:
            return self._score_and_route(rollouts, lambda batch: reader.read(batch, reading.outputs()))

    def routing(self) -> Routing | None:
        return self._routing

    def _score_and_route(
        self, rollouts: Sequence[Rollout], after_forward: Callable[[MicroBatch], None] = lambda batch: None
    ) -> list[TokenScores]:
        """The scores under the policy. Also sets its routing."""
        if not self.routers:
            return self._score(self.policy, rollouts, after_forward)
        parts: list[Routing] = []
        with reading_routers(self.routers) as read:

            def after_routing(batch: MicroBatch) -> None:
                parts.append(read.routing(batch.predicts_N))
                after_forward(batch)

            scores = self._score(self.policy, rollouts, after_routing)
        self._routing = reduce(add, parts)
        return scores

    def reference_logprobs(self, rollouts: Sequence[Rollout]) -> Sequence[Tensor | None]:
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
            with self._attention(model), self._routers(model, batch), self._autocast():
                hidden_ND = batch.hidden(model)
            scores = score_hidden(
                PolicyHead(model, self._autocast),
                hidden_ND,
                batch.responses_N,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
            )
            by_row.update(zip(batch.rows, scores.cpu().split(batch.lengths), strict=True))
            after_forward(batch)
        return [by_row[row] for row in range(len(rollouts))]

    def forward_backward(self, examples: Sequence[Example]) -> LossMetrics:
        tokens = sum(len(example.rollout.response_ids) for example in examples)
        totals = Totals(tokens, len(examples), self.config.sampling.max_tokens)
        # An example without advantage and reference has no gradient, unless routers are trained on it: it counts in the
        # means, but is not computed.
        trained = [
            e
            for e in examples
            if e.advantage != 0.0 or e.reference_logprobs is not None or self.config.router_coefficient
        ]
        left_out = tokens - sum(len(example.rollout.response_ids) for example in trained)
        sums = {
            "loss": 0.0,
            "clip_fraction": 0.0,
            "policy_ratio": left_out / tokens,
            "policy_kl": 0.0,
            "reference_kl": 0.0,
        }
        self.optimiser.zero_grad()
        for batch in self._microbatches([example.rollout for example in trained]):
            terms = self._backward(batch, [trained[row] for row in batch.rows], totals)
            sums = {name: value + terms[name] for name, value in sums.items()}
        return LossMetrics(**sums)

    def optimiser_step(self, learning_rate: float) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate
        self.optimiser.step()
        return norm.item()

    def _backward(self, batch: MicroBatch, examples: Sequence[Example], totals: Totals) -> dict[str, float]:
        """Add the micro-batch's gradient. `examples` are its rows. Returns its part of the whole batch's means."""
        advantages_N = torch.tensor([e.advantage for e in examples]).repeat_interleave(torch.tensor(batch.lengths))
        old_logprobs_N = torch.cat([example.old_logprobs for example in examples])
        references = [e.reference_logprobs for e in examples if e.reference_logprobs is not None]
        weights = [example.weights for example in examples if example.weights is not None]
        balances = self.config.router_coefficient > 0.0
        with self._attention(self.policy), self._routers(self.policy, batch):
            with self._autocast(), reading_routers(self.routers if balances else []) as read:
                hidden_ND = batch.hidden(self.policy)
            head = PolicyHead(self.policy, self._autocast)
            logprobs_N = hidden_logprobs(head, hidden_ND, batch.responses_N, self.config.sampling.temperature)
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
            if balances:
                assert self._routing is not None, "the step's rollouts were not scored"
                balance = read.loss(batch.predicts_N, self._routing.frequencies_LE, tokens=totals.tokens)
                loss = loss + self.config.router_coefficient * balance
            loss.backward()
        parts = {**objective.metrics, "loss": loss, "reference_kl": divergence}
        return {name: part.item() for name, part in parts.items()}

    def _attention(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        return packed_attention(model) if self.packs else nullcontext()

    def _routers(self, model: PreTrainedModel, batch: MicroBatch) -> AbstractContextManager[None]:
        """Within this context, the policy's routers choose the recorded experts. The reference's choose their own, so
        that the divergence from it sees how far the policy's routers have moved."""
        if not self.config.router_replay or model is not self.policy:
            return nullcontext()
        if batch.experts_SLK is None:
            raise ValueError(
                "router_replay: a rollout has no routed experts to replay; it was recorded without router_replay"
            )
        return replaying(model, batch.experts_SLK)

    def _autocast(self) -> AbstractContextManager[None]:
        """Within this context, the products of float32 weights are in `compute_dtype`."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.policy.dtype != self.compute_dtype)

    def _microbatches(self, rollouts: Sequence[Rollout]) -> Iterator[MicroBatch]:
        batches = packed_batches if self.packs else padded_batches
        for batch in batches(rollouts, self.config.max_tokens_per_microbatch):
            yield batch.to(self.device)

    def export(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The policy as `save_pretrained` writes it: without tied duplicates, and with one tensor per expert where
        transformers holds experts fused."""
        own = remove_tied_weights_from_state_dict(dict(self.policy.state_dict()), self.policy)
        tensors = revert_weight_conversion(self.policy, own)
        return {name: t.detach().to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}

    def save(self, folder: Path) -> None:
        self.policy.save_pretrained(folder)
        self.carried.write(folder)
        save_file(adamw_state(self.policy, self.optimiser), folder / OPTIMISER)

    def load(self, folder: Path) -> None:
        self.policy.load_state_dict(load_policy(folder, self.policy.dtype).state_dict())
        self.carried = Carried.read(folder)
        restore_adamw_state(load_file(folder / OPTIMISER), self.policy, self.optimiser)
        self.holds_part_of_a_step = False

    def checkpoint_bytes(self) -> int:
        """The size of the weights, AdamW's two moments, and an MTP head. A checkpoint of step 0 has no moments."""
        weights = sum(parameter.nbytes for parameter in self.policy.parameters())
        return 3 * weights + sum(tensor.nbytes for tensor in self.carried.head.values())

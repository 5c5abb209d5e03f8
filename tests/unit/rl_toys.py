"""Toys for the tests of rl_loop: tiny random policies, a character tokenizer, a task, and a source that samples."""

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from toy_rewards import CountLetterA
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from rl_loop.batching import Rollout
from rl_loop.config import TrainConfig
from rl_loop.learner.online_drafter import OnlineDrafter
from rl_loop.learner.policy_learner import PolicyLearner
from rl_loop.loops.publishing import Export
from rl_loop.loops.sources import RolloutSource
from rl_loop.loops.synchronous import SynchronousLoop
from rl_loop.reports.metrics_log import MetricsLog
from rl_loop.reports.reporting import Reporter
from rl_loop.run.checkpoint import RunState
from rl_loop.tasks import Task
from rl_loop.tasks.rewards import Rewards, RewardsHere
from rollout_service.protocol import Completion, Group, GroupRequest, Speculation, WeightsOf, WeightSpan

CHARACTERS = "\n 0123456789+-=abcdefgh"
VOCAB_SIZE = len(CHARACTERS) + 1
EOS = len(CHARACTERS)


SHAPES = [(3, 5), (7, 2), (2, 9), (5, 1), (3, 4)]
"""prompt and response lengths of `rollouts`"""


def rollouts() -> list[Rollout]:
    """Random rollouts without log-probabilities. The first and last share a prompt."""
    torch.manual_seed(1)

    def draw(length: int) -> list[int]:
        return torch.randint(VOCAB_SIZE, (length,)).tolist()

    drawn = [Rollout(draw(prompt), draw(response), [0.0] * response) for prompt, response in SHAPES]
    drawn[4].prompt_ids[:] = drawn[0].prompt_ids
    return drawn


def llama(seed: int = 0, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        eos_token_id=EOS,
        bos_token_id=None,
        pad_token_id=None,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).float().eval()


def qwen3_next(
    seed: int = 0, first_layer: str = "linear_attention", experts: int = 2, active: int = 2
) -> Qwen3NextForCausalLM:
    """The demo policy's architecture, with one of the linear-attention layers that the demo leaves out. A token passes
    `active` experts."""
    torch.manual_seed(seed)
    config = Qwen3NextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=[first_layer, "full_attention"],
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        num_experts=experts,
        num_experts_per_tok=active,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        max_position_embeddings=128,
        eos_token_id=EOS,
        bos_token_id=None,
        pad_token_id=None,
        initializer_range=0.2,
    )
    return Qwen3NextForCausalLM(config).float().eval()


def nemotron_h(seed: int = 0, first_layer: str = "full_attention") -> NemotronHForCausalLM:
    """Attention and experts in a latent space, chosen with a correction bias."""
    torch.manual_seed(seed)
    config = NemotronHConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        layers_block_type=[first_layer, "moe", "full_attention", "mlp"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=16,
        n_groups=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_latent_size=16,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=24,
        routed_scaling_factor=1.5,
        max_position_embeddings=128,
        eos_token_id=EOS,
        bos_token_id=None,
        pad_token_id=None,
        initializer_range=0.2,
    )
    policy = NemotronHForCausalLM(config).float().eval()
    for name, buffer in policy.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, std=0.3)
    return policy


def character_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {character: i for i, character in enumerate(CHARACTERS)} | {"<eos>": EOS}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@torch.no_grad()
def sample(
    model: PreTrainedModel, prompt: list[int], n: int, max_tokens: int, temperature: float, seed: int
) -> list[tuple[list[int], list[float]]]:
    """n responses and their tokens' log-probabilities, by plain sampling without a cache."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([prompt] * n)
    logprobs = torch.zeros(n, 0)
    for _ in range(max_tokens):
        distribution = (model(input_ids=tokens).logits[:, -1] / temperature).log_softmax(-1)
        drawn = torch.multinomial(distribution.exp(), 1, generator=generator)
        tokens = torch.cat([tokens, drawn], 1)
        logprobs = torch.cat([logprobs, distribution.gather(1, drawn)], 1)
    rows = tokens[:, len(prompt) :].tolist()
    ends = [row.index(EOS) + 1 if EOS in row else max_tokens for row in rows]
    return [(row[:end], logprob[:end].tolist()) for row, logprob, end in zip(rows, logprobs, ends, strict=True)]


class SamplingSource:
    """A rollout service in miniature, and its publisher: samples from its own copy of the policy, which `publish`
    replaces."""

    def __init__(self, model: PreTrainedModel, version: int = 0):
        self.model, self.version = model, version
        self.tokenizer = character_tokenizer()

    @property
    def publisher(self) -> "SamplingSource":
        return self

    def publish(self, of: WeightsOf, export: Export, version: int, *, is_new: bool = True) -> int:
        self.version = max(version, self.version) + 1
        self.model.load_state_dict(export(torch.float32), strict=True)
        return self.version

    def release(self) -> None:
        pass

    def rollouts(self, batch: str, requests: Sequence[GroupRequest]) -> Generator[Group]:
        for request in reversed(requests):  # groups do not arrive in order
            yield self._group(request)

    def _group(self, request: GroupRequest) -> Group:
        prompt, sampling = self.tokenizer.encode(request.prompt), request.sampling
        drawn = sample(self.model, prompt, request.n, sampling.max_tokens, sampling.temperature, sampling.seed or 0)
        record = Speculation(
            drafter="toy", drafter_version=0, draft_steps=2, drafted=4, accepted=3, accepted_histogram=[0, 1, 1]
        )
        completions = [
            Completion(
                index=i,
                text=self.tokenizer.decode(ids, skip_special_tokens=True),
                token_ids=ids,
                logprobs=logprobs,
                weight_versions=[WeightSpan(version=self.version, start=0, end=len(ids))],
                finish_reason="stop" if ids[-1] == EOS else "length",
                speculation=record,
            )
            for i, (ids, logprobs) in enumerate(drawn)
        ]
        return Group(
            id=str(request.id),
            prompt_token_ids=prompt,
            completions=completions,
            engine=0,
            sampling=request.sampling,
            metadata=request.metadata,
        )


class Positioned(SamplingSource):
    """Responses read `problem.completion`, by the problem's index in the run and the completion's in its group."""

    def _group(self, request: GroupRequest) -> Group:
        group = super()._group(request)
        for completion in group.completions:
            completion.text = f"{request.metadata['index']}.{completion.index}"
        return group


def config(output: Path, **changes: Any) -> TrainConfig:
    fields: dict[str, Any] = {
        "model": "toy",
        "output": output,
        "steps": 2,
        "prompts_per_step": 3,
        "completions": 4,
        "learning_rate": 1e-2,
        "evaluate_every": 0,
        "evaluation_prompts": 4,
        "device": "cpu",
        "sampling": {"max_tokens": 6},
        "task": {"pass_threshold": 0.5},
    }
    return TrainConfig.model_validate(fields | changes)


def loop(
    settings: TrainConfig,
    learner: PolicyLearner,
    source: RolloutSource,
    state: RunState | None = None,
    task: Task | None = None,
    rewards: Rewards | None = None,
    drafter: OnlineDrafter | None = None,
) -> SynchronousLoop:
    log = MetricsLog(settings.output, state.step if state else 0)
    reporter = Reporter(log, settings.steps, Console(quiet=True))
    task, tokenizer = task or CountLetterA(), character_tokenizer()
    rewards = rewards or RewardsHere(task)
    return SynchronousLoop(
        settings, task, learner, tokenizer, source, rewards, reporter, state or RunState(), drafter=drafter
    )

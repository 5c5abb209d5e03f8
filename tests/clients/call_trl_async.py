"""TRL's AsyncGRPOTrainer: three steps on the demo's policy, with this service's pushes (adapters/trl.py).

Two functions of TRL are replaced, since they ask for a GPU. Its attention is a kernel from a model hub (FlashAttention
3), and `attention` below computes the same. And TRL looks up how fast the GPU is.

TRL sends its model's name with each request. So the policy is linked here under the name that the service has for it.
"""

import os
import tempfile
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import torch
from checks import MODEL, POLICY, PROMPTS, Checks, equal
from datasets import Dataset
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_grpo_trainer, packing
from trl.generation.vllm_client import VLLMClient
from trl_policy import WITHIN, agreement, difference, policy, tokenizer, variety

from rollout_service.adapters.trl import Pushes
from rollout_service.client import RolloutClient

STEPS = 3
PLAIN = {"defaults": {"role": "assistant"}, "fields": {"content": {"close_pattern": "$", "content": "text"}}}
"""how TRL reads a response: as text. TRL knows the templates of released models, and asks for this of any other"""


def attention(query, key, value, starts_q, starts_k, longest_q, longest_k, softmax_scale=None, **_):
    """flash_attn_varlen_func, causal: segments of queries, each aligned with the end of its segment of keys."""
    out = torch.empty_like(query)
    groups = query.shape[1] // key.shape[1]
    for (q0, q1), (k0, k1) in zip(pairwise(starts_q), pairwise(starts_k), strict=True):
        q, k, v = (x.transpose(0, 1) for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
        k, v = (x.repeat_interleave(groups, 0) for x in (k, v))
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        segment = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=softmax_scale)
        out[q0:q1] = segment.transpose(0, 1)
    return out


def three_steps(checks: Checks) -> str:
    packing._flash_attn = lambda: SimpleNamespace(flash_attn_varlen_func=attention)
    async_grpo_trainer.get_peak_flops_per_device = lambda *_: None
    folder = Path(tempfile.mkdtemp())
    (folder / MODEL).symlink_to(POLICY)
    os.chdir(folder)
    names = tokenizer()
    names.response_template = PLAIN
    messages = [[{"role": "user", "content": prompt.strip()}] for prompt in PROMPTS]
    with RolloutClient(checks.endpoint) as client:
        before = client.weights().policy.version
        trainer = AsyncGRPOTrainer(
            model=MODEL,
            reward_funcs=variety,
            train_dataset=Dataset.from_dict({"prompt": messages * 64}),
            processing_class=names,
            weight_transfer=Pushes(checks.endpoint, MODEL),
            args=AsyncGRPOConfig(
                output_dir=str(folder / "run"),
                vllm_server_base_url=checks.endpoint,
                max_steps=STEPS,
                num_generations=4,
                per_device_train_batch_size=8,
                gradient_accumulation_steps=1,
                max_completion_length=48,
                temperature=1.5,
                learning_rate=3e-4,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                bf16=False,
                dtype="float32",
            ),
        )
        # TRL counts operations by a name that this architecture's configuration has not.
        trainer.model.config.num_local_experts = trainer.model.config.num_experts
        trainer.train()
        after = client.weights().policy.version
    steps = [entry for entry in trainer.state.log_history if "kl" in entry]
    equal(len(steps), STEPS, "steps")
    equal(after, before + STEPS + 1, "weight versions")
    # The first step is trained on samples of the policy that it begins with.
    assert abs(steps[0]["ratio"] - 1) < WITHIN, steps[0]
    prompts = names(PROMPTS)["input_ids"]
    answer = VLLMClient(base_url=checks.endpoint).generate(prompts, n=4, max_tokens=48)
    worst, moved = agreement(trained(trainer), answer, n=4), difference(policy(), answer, n=4)
    assert moved > 10 * WITHIN, f"training moved the policy by {moved:.1e} only, so that old weights would pass"
    return (
        f"{STEPS + 1} pushes; log-probabilities differ by {worst:.0e} after them (by {moved:.0e} from the policy "
        "before training). TRL's attention kernel and its look-up of the GPU's speed were replaced"
    )


def trained(trainer: AsyncGRPOTrainer) -> torch.nn.Module:
    """The trained policy with transformers' own attention and output head."""
    model = policy()
    model.load_state_dict(trainer.model.state_dict())
    return model


if __name__ == "__main__":  # the trainer's rollout process imports this file again
    trl = Checks("trl")
    trl.call("AsyncGRPOTrainer, three steps")(lambda: three_steps(trl))

"""Importance ratios between an engine in bfloat16 and the learner, with and without router replay.

    python tests/benchmarks/router_replay.py
    python tests/benchmarks/router_replay.py --engine float32
    python tests/benchmarks/router_replay.py --model FOLDER

The policy is a tiny random `latent_moe` (3 of 8 experts in each of 3 layers), or the mixture in FOLDER, rounded to the
engine's dtype for both sides. The engine samples at temperature 1 from random prompts. The learner scores the samples
by `LocalLearner.logprobs`, with products in float32 and in bfloat16. The ratio of a token is the learner's probability
over the engine's. A choice differs if the learner's own router would take another set of experts.
"""

import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel

MODELS = Path(__file__).resolve().parents[2] / "deploy" / "demo" / "models"
PROMPT, RESPONSE = 16, 128

# Before vllm is imported.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_PLUGINS": "rollout_service",
    "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip

from drafters.latent_moe import LatentMoEConfig, LatentMoEForCausalLM  # noqa: E402
from rl_loop.batching import Rollout  # noqa: E402
from rl_loop.config import TrainConfig  # noqa: E402
from rl_loop.learner.local_learner import LocalLearner, load_policy  # noqa: E402


def random_policy(folder: Path) -> None:
    """Random weights that are large enough for clearly different outputs."""
    torch.manual_seed(0)
    config = LatentMoEConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=3, head_dim=32, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=256, layer_types=["full_attention"] * 3, num_experts=8, num_experts_per_tok=3,
        moe_latent_size=32, moe_intermediate_size=64, shared_expert_intermediate_size=64, tie_word_embeddings=False,
        eos_token_id=1, bos_token_id=None, pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
    )  # fmt: skip
    model = LatentMoEForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
    model.float().save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODELS / "policy").save_pretrained(folder)


def sample(folder: Path, dtype: str, completions: int, vocabulary: int) -> list[Rollout]:
    from vllm import SamplingParams

    from rollout_service.config import ServiceConfig
    from rollout_service.engine.arguments import bare_llm

    engine = {"dtype": dtype, "max_model_len": 256, "routed_experts": True, "kv_cache_gib": 0.25, "device": "cpu"}
    llm = bare_llm(ServiceConfig.model_validate({"model": str(folder), "engine": engine}))
    llm.collective_rpc("return_routed_experts")
    torch.manual_seed(1)
    prompts = torch.randint(2, vocabulary, (completions, PROMPT)).tolist()
    params = SamplingParams(max_tokens=RESPONSE, ignore_eos=True, logprobs=0, seed=0, flat_logprobs=True)
    rollouts = []
    for output in llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False):
        (completion,) = output.outputs
        logprobs = completion.logprobs.logprobs  # type: ignore[union-attr]
        tokens = list(completion.token_ids)
        rollouts.append(Rollout(output.prompt_token_ids or [], tokens, logprobs, experts=completion.routed_experts))
    llm.llm_engine.engine_core.shutdown()
    return rollouts


def choices_that_differ(policy: PreTrainedModel, rollouts: list[Rollout], autocast: bool) -> float:
    """The share of the router's choices that are another set than the recorded one, when nothing is replayed."""
    differing = choices = 0
    for rollout in rollouts:
        chosen: list[torch.Tensor] = []
        recorder = policy._can_record_outputs["router_logits"].target_class  # type: ignore[index]
        routers = [module for module in policy.modules() if isinstance(module, recorder)]
        hooks = [
            router.register_forward_hook(lambda _, inputs, out, chosen=chosen: chosen.append(out[-1]))
            for router in routers
        ]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            policy(input_ids=torch.tensor([rollout.prompt_ids + rollout.response_ids[:-1]]))
        for hook in hooks:
            hook.remove()
        recorded = torch.from_numpy(rollout.experts.astype("int64")).sort(-1).values  # type: ignore[union-attr]
        own = torch.stack(chosen, dim=1).sort(-1).values
        differing += int((own != recorded).any(-1).sum())
        choices += own.shape[0] * own.shape[1]
    return differing / choices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a mixture of experts in place of the random policy")
    parser.add_argument("--engine", default="bfloat16", choices=["bfloat16", "float32"], help="the engine's dtype")
    parser.add_argument("--completions", type=int, default=128, help=f"responses of {RESPONSE} tokens")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.model or Path(made)
        if arguments.model is None:
            random_policy(folder)
        policy = load_policy(folder).to(getattr(torch, arguments.engine)).float()  # type: ignore[arg-type]
        rollouts = sample(folder, arguments.engine, arguments.completions, policy.config.get_text_config().vocab_size)
    engine = torch.tensor([logprob for rollout in rollouts for logprob in rollout.logprobs], dtype=torch.float64)
    print(f"engine {arguments.engine}, {len(engine)} tokens, torch {torch.__version__}")
    print("learner   replay  choices that differ   max |dlogp|   mean |dlogp|   max ratio   ratio > 2 or < 1/2   k3 KL")
    for dtype in ("float32", "bfloat16"):
        differ = choices_that_differ(policy, rollouts, autocast=dtype == "bfloat16")
        for replay in (False, True):
            config = TrainConfig(model=str(folder), dtype=dtype, router_replay=replay)  # type: ignore[arg-type]
            learner = LocalLearner(config, policy)
            given = rollouts if replay else [replace(rollout, experts=None) for rollout in rollouts]
            log_ratio = torch.cat([score.logprobs for score in learner.logprobs(given)]).double() - engine
            ratio = log_ratio.exp()
            far = (log_ratio.abs() > torch.tensor(2.0).log()).double().mean().item()
            kl = (ratio - 1.0 - log_ratio).mean().item()
            print(
                f"{dtype:8}  {'yes' if replay else 'no':6}  {'0' if replay else f'{differ:.3%}':>19}   "
                f"{log_ratio.abs().max():11.4g}   {log_ratio.abs().mean():12.3g}   {ratio.max():9.4g}   {far:18.3%}   "
                f"{kl:.2e}"
            )


if __name__ == "__main__":
    main()

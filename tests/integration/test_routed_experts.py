"""An engine on a CPU returns the experts that its routers chose: those that a recomputation of each response chooses.

With drafts that are rejected, prompts from the prefix cache, requests that are preempted, and after new weights.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engines import MODELS, ROOT, in_process_llm, launched
from tiny_models import save_policy

from drafters.registry import DrafterConfig
from rl_loop.batching import Rollout
from rl_loop.learner.padding import padded_batches
from rl_loop.learner.router_replay import replaying
from rollout_service.protocol import RoutedExperts

pytestmark = pytest.mark.again
BLOCK = 32
"""tokens in a block of the KV cache"""
LIKELY = 1e-4
"""a margin between the last chosen expert's score and the next; below it, a recomputation may choose another"""


@pytest.fixture(scope="module")
def policy_and_engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    policy = save_policy("latent_moe", 0, folder, MODELS / "policy")
    drafter = DrafterConfig(kind="mtp", draft_tokens=3)
    # Fewer blocks than eight responses need, so that some requests are preempted; prompts are read in parts.
    with in_process_llm(
        folder, drafter, max_num_seqs=8, block_size=BLOCK, num_gpu_blocks_override=20, max_num_batched_tokens=128,
        enable_return_routed_experts=True,
        per_request_spec_decode_metrics="detailed",
    ) as llm:  # fmt: skip
        llm.collective_rpc("return_routed_experts")
        yield policy, llm


def params_of(length):
    from vllm import SamplingParams

    return SamplingParams(max_tokens=length, ignore_eos=True, logprobs=0, seed=0)


def generated(llm, prompts, length=60):
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params_of(length), use_tqdm=False)
    return [rollout_of(output) for output in outputs], outputs


def rollout_of(output):
    (completion,) = output.outputs
    tokens = list(completion.token_ids)
    logprobs = [step[token].logprob for step, token in zip(completion.logprobs, tokens, strict=True)]
    return Rollout(output.prompt_token_ids, tokens, logprobs, experts=completion.routed_experts)


def recomputed(policy, rollout):
    """The experts (T, L, K) that the policy's routers choose, sorted, and the margin of each choice (T, L)."""
    scores, hooks = [], []
    for layer in policy.model.layers:
        hooks.append(layer.mlp.gate.register_forward_hook(lambda _, inputs, output: scores.append(output[0])))
    with torch.no_grad():
        policy(input_ids=torch.tensor([rollout.prompt_ids + rollout.response_ids[:-1]]))
    for hook in hooks:
        hook.remove()
    values, experts = torch.stack(scores, dim=1).softmax(-1).topk(4)
    return experts[..., :3].sort(-1).values, values[..., 2] - values[..., 3]


def differing(policy, rollout, shift=0):
    """The share of choices with a margin that differ from the recomputation."""
    experts, margins = recomputed(policy, rollout)
    found = torch.from_numpy(rollout.experts.astype("int64")).roll(shift, 0).sort(-1).values
    assert found.shape == experts.shape
    return (found != experts).any(-1)[margins > LIKELY].float().mean().item()


def replayed_logprobs(policy, rollout):
    (batch,) = padded_batches([rollout], 10_000)
    with torch.no_grad(), replaying(policy, batch.experts_SLK):
        logits = policy(input_ids=batch.blocks[0].tokens_BT).logits[0]
    begin = len(rollout.prompt_ids) - 1
    return logits[begin:-1].log_softmax(-1).gather(1, torch.tensor(rollout.response_ids)[:, None]).squeeze(1)


def prompts_of(count, length, seed):
    torch.manual_seed(seed)
    return [torch.randint(2, 128, (length,)).tolist() for _ in range(count)]


def preemptions(llm):
    return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")


def check(policy, rollouts):
    for rollout in rollouts:
        assert differing(policy, rollout) == 0.0
        assert differing(policy, rollout, shift=1) > 0.5, "a shift by one token would be seen"
        difference = replayed_logprobs(policy, rollout) - torch.tensor(rollout.logprobs)
        assert difference.abs().max() <= 1e-4


def test_the_rows_are_the_experts_that_a_recomputation_chooses(policy_and_engine):
    policy, llm = policy_and_engine
    rollouts, outputs = generated(llm, prompts_of(4, 37, seed=1))
    check(policy, rollouts)
    metrics = [output.outputs[0].spec_decode_metrics for output in outputs]
    accepted = sum(sum(m.per_step_accepted) for m in metrics)
    assert 0 < accepted < sum(m.num_draft_tokens for m in metrics), "drafts were accepted and rejected"


def test_tokens_from_the_prefix_cache_have_theirs(policy_and_engine):
    policy, llm = policy_and_engine
    prompts = prompts_of(2, 100, seed=2)
    generated(llm, prompts)
    rollouts, outputs = generated(llm, [prompts[0], prompts[1][:70] + prompts[0][:10]])
    assert all(output.num_cached_tokens > 0 for output in outputs)
    check(policy, rollouts)


def test_requests_that_are_preempted_have_each_row_once(policy_and_engine):
    policy, llm = policy_and_engine
    before = preemptions(llm)
    rollouts, _ = generated(llm, prompts_of(8, 37, seed=3), length=80)
    assert preemptions(llm) > before
    check(policy, rollouts)


def test_responses_that_are_computed_again_after_a_pause_have_each_row_once(policy_and_engine):
    """As by a push with running = "keep" and kv_cache = "recompute"."""
    policy, llm = policy_and_engine
    engine = llm.llm_engine
    for number, prompt in enumerate(prompts_of(3, 50, seed=7)):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, params_of(60))
    outputs = [output for _ in range(8) for output in engine.step()]
    engine.reset_prefix_cache(reset_running_requests=True)
    while engine.has_unfinished_requests():
        outputs += engine.step()
    finished = [output for output in outputs if output.finished]
    assert len(finished) == 3
    check(policy, [rollout_of(output) for output in finished])


def test_prompts_longer_than_a_step_have_each_row_once(policy_and_engine):
    """A prompt is read in parts when others fill the step."""
    policy, llm = policy_and_engine
    rollouts, _ = generated(llm, prompts_of(3, 150, seed=4), length=12)
    check(policy, rollouts)


def test_they_are_those_of_the_new_weights_after_a_reload(policy_and_engine, tmp_path):
    policy, llm = policy_and_engine
    prompts = prompts_of(2, 37, seed=5)
    generated(llm, prompts)
    new = save_policy("latent_moe", 1, tmp_path, MODELS / "policy")
    old = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    load(llm, tmp_path / "model.safetensors")
    llm.reset_prefix_cache()
    rollouts, _ = generated(llm, prompts)
    check(new, rollouts)
    assert differing(policy, rollouts[0]) > 0.5, "the weights are others"
    policy.load_state_dict(old)


def load(llm, file):
    llm.collective_rpc("read_checkpoint_tensors", args=(str(file),))
    (checksum,) = llm.collective_rpc("checksum_that_was_read")
    llm.collective_rpc("load_checkpoint_tensors", args=(checksum, False))


def test_a_completion_on_the_wire_has_them(policy_and_engine):
    _, llm = policy_and_engine
    (rollout,), _ = generated(llm, prompts_of(1, 5, seed=6), length=9)
    experts = RoutedExperts.of(rollout.experts)
    assert (experts.dtype, experts.shape) == ("uint8", (5 + 9 - 1, 3, 3))


def test_a_run_replays_them_in_both_modes(tmp_path):
    folder = tmp_path / "policy"
    save_policy("latent_moe", 0, folder, MODELS / "policy")
    problems = tmp_path / "problems.jsonl"  # of few characters, since the policy's vocabulary is small
    problems.write_text("".join(json.dumps({"prompt": f"{a}+{a}=", "answer": 2 * a}) + "\n" for a in range(20)))
    with launched(
        "--model", str(folder), "--engine.dtype", "float32", "--engine.max_model_len", "256", "--drafter.kind", "mtp",
        "--engine.kv_cache_gib", "0.1", "--engine.routed_experts",
    ) as (url, _):  # fmt: skip
        for mode in ("sync", "async"):
            output = tmp_path / mode
            run = subprocess.run(
                [str(Path(sys.executable).parent / "rl-loop"), "train", "--mode", mode, "--model", str(folder),
                 "--endpoint", url, "--output", str(output), "--task.kind", "jsonl", "--task.path", str(problems),
                 "--steps", "1", "--prompts_per_step", "4", "--completions", "2", "--sampling.max_tokens", "40",
                 "--evaluate_every", "0", "--router_replay", "--record_rollouts"],
                capture_output=True, text=True, cwd=ROOT, timeout=300,
            )  # fmt: skip
            assert run.returncode == 0, run.stderr
            (step,) = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
            assert step["logprob_difference_max"] <= 1e-4
            assert any("routed_experts" in file.read_text() for file in (output / "rollouts").rglob("*.jsonl"))

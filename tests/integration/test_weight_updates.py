"""New weights in a running engine, for every supported policy architecture and every drafter kind.

The proof is in the log-probabilities: those that the engine returns equal a float32 recomputation by transformers with
the weights it is said to hold, to 1e-4. Stale packed copies (tied heads, experts) are off by whole nats.
"""

import pytest
import torch
from engines import MODELS, in_process_llm
from tiny_models import EACH_ONCE, PAIRS, VOCAB, save_drafter, save_policy
from transformers import AutoModelForCausalLM

from drafters.registry import make_drafter
from drafters.scoring import score_tokens
from rollout_service.tensor_bytes import file_checksum

SAMPLING = {"temperature": 0.8, "top_k": 30, "top_p": 0.95}


def worst_difference(llm, model):
    """Largest |returned - recomputed| log-probability over some hundred sampled tokens, in nats."""
    from vllm import SamplingParams

    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, VOCAB, (8, 12), generator=generator)
    params = SamplingParams(max_tokens=24, ignore_eos=True, logprobs=0, flat_logprobs=True, **SAMPLING)
    outputs = llm.generate([{"prompt_token_ids": p.tolist()} for p in prompts], params, use_tqdm=False)
    worst = 0.0
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = torch.tensor(output.outputs[0].token_ids)
        with torch.no_grad():
            logits = model(torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1]
        expected = score_tokens(logits, tokens, **SAMPLING).sampled_logprobs
        worst = max(worst, (expected - torch.tensor(output.outputs[0].logprobs.logprobs)).abs().max().item())
    return worst


@pytest.mark.parametrize(
    ("name", "kind"), [pytest.param(*pair, marks=[] if pair in EACH_ONCE else pytest.mark.again) for pair in PAIRS]
)
def test_pushed_weights_are_the_ones_that_sample(name, kind, tmp_path):
    old = save_policy(name, seed=0, folder=tmp_path / "old", tokenizer=MODELS / "policy")
    new = save_policy(name, seed=1, folder=tmp_path / "new", tokenizer=MODELS / "policy")
    drafter = save_drafter(kind, old, seed=2, folder=tmp_path / "drafter")
    old, new = (AutoModelForCausalLM.from_pretrained(tmp_path / n, dtype=torch.float32) for n in ("old", "new"))
    with in_process_llm(tmp_path / "old", drafter) as llm:
        assert worst_difference(llm, old) < 1e-4
        report = load(llm, policy_update(tmp_path), of_drafter=False)
        # Norms of a random policy are all ones, old and new. Every other module changes.
        assert report["changed"] > report["modules"] / 3
        llm.reset_prefix_cache()
        assert worst_difference(llm, new) < 1e-4
        assert worst_difference(llm, old) > 0.1  # the measure sees the difference

        if kind in ("draft_model", "eagle3", "mtp"):
            before = drafter_tensor_sum(llm)
            save_drafter(kind, new, seed=3, folder=tmp_path / "drafter2")
            update = tmp_path / "drafter2" / "model.safetensors"
            assert other_bytes_change_nothing(llm, update)
            assert load(llm, update, of_drafter=True)["changed"] > 0
            assert silent_load_is_noticed(llm, update)
            assert drafter_tensor_sum(llm) != before
            assert worst_difference(llm, new) < 1e-4  # a drafter's update never changes the policy


def load(llm, update, of_drafter):
    llm.collective_rpc("read_checkpoint_tensors", args=(str(update),))
    (report,) = llm.collective_rpc("load_checkpoint_tensors", args=(file_checksum(update), of_drafter))
    assert report.pop("checksum") == file_checksum(update)
    return report


def other_bytes_change_nothing(llm, update):
    """The engine reads a file that differs from what was sent, and does not load it."""
    before = drafter_tensor_sum(llm)
    llm.collective_rpc("read_checkpoint_tensors", args=(str(update),))
    (report,) = llm.collective_rpc("load_checkpoint_tensors", args=("0" * 64, True))
    return report["checksum"] == file_checksum(update) and drafter_tensor_sum(llm) == before


def silent_load_is_noticed(llm, update):
    """A drafter that takes no tensor of an update raises no error, but the report of the load shows it."""
    from rollout_service.config import AlarmConfig
    from rollout_service.engine.loading import Loaded
    from rollout_service.fleet.alarms import Alarms

    drafter = llm.llm_engine.model_executor.driver_worker.worker.model_runner.drafter.model
    drafter.load_weights = lambda weights: [None for _ in weights]
    report = load(llm, update, of_drafter=True)
    del drafter.load_weights
    alarms = Alarms(AlarmConfig())
    alarms.after_push("drafter", 1, 2, is_new=True, loaded={0: Loaded(0.0, **report)})
    return [alarm.kind for alarm in alarms.raised] == ["not_changed"]


def policy_update(folder):
    """The tensors that a trainer pushes: the new policy's own, without an MTP head."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "new" / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if not n.startswith("mtp.")}, folder / "update.safetensors")
    return folder / "update.safetensors"


def drafter_tensor_sum(llm):
    """A number that changes with the drafter's norms, which are never packed."""
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.drafter.model
    tensors = [p.double().abs().sum().item() for n, p in model.named_parameters() if p.numel()]
    return sum(tensors)


def test_every_kind_with_weights_says_which_tensors_are_its_own(tmp_path):
    policy = save_policy("qwen3_next", seed=0, folder=tmp_path / "p", tokenizer=MODELS / "policy")
    for kind in ("draft_model", "eagle3", "mtp"):
        drafter = make_drafter(save_drafter(kind, policy, seed=0, folder=tmp_path / kind))
        assert drafter.checkpoint(tmp_path / "p") is not None
    assert not make_drafter(save_drafter("mtp", policy, 0, tmp_path / "m")).owns("lm_head.weight")

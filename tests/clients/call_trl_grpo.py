"""TRL's GRPOTrainer in server mode: three steps on the demo's policy, with this service's pushes (adapters/trl.py).

TRL itself measures how far the log-probabilities of what was sampled lie from the trainer's own. A push goes before the
first step, and after each step.
"""

import tempfile

from checks import POLICY, PROMPTS, Checks, equal
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from trl_policy import WITHIN, agreement, difference, policy, tokenizer, variety

from rollout_service.adapters.trl import use_pushes
from rollout_service.client import RolloutClient

STEPS = 3
checks = Checks("trl")


@checks.call("GRPOTrainer, vllm_mode server, three steps")
def three_steps() -> str:
    with RolloutClient(checks.endpoint) as client:
        before = client.weights().policy.version
        use_pushes(str(POLICY))
        trainer = GRPOTrainer(
            model=str(POLICY),
            reward_funcs=variety,
            train_dataset=Dataset.from_dict({"prompt": PROMPTS * 8}),
            processing_class=tokenizer(),
            args=GRPOConfig(
                output_dir=tempfile.mkdtemp(),
                use_vllm=True,
                vllm_mode="server",
                vllm_server_base_url=checks.endpoint,
                max_steps=STEPS,
                num_generations=4,
                per_device_train_batch_size=8,
                max_completion_length=48,
                temperature=1.5,
                learning_rate=3e-4,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                bf16=False,
                model_init_kwargs={"dtype": "float32"},
            ),
        )
        trainer.train()
        steps = [entry for entry in trainer.state.log_history if "reward" in entry]
        equal(len(steps), STEPS, "steps")
        differences = [entry["sampling/sampling_logp_difference/max"] for entry in steps]
        assert max(differences) < WITHIN, f"log-probabilities differ by {differences}"
        trainer.vllm_generation.sync_weights()
        after = client.weights().policy.version
    equal(after, before + STEPS + 1, "weight versions")
    prompts = trainer.processing_class(PROMPTS)["input_ids"]
    answer = trainer.vllm_generation.vllm_client.generate(prompts, n=4, max_tokens=48)
    worst, moved = agreement(trainer.model.eval(), answer, n=4), difference(policy(), answer, n=4)
    assert moved > 10 * WITHIN, f"training moved the policy by {moved:.1e} only, so that old weights would pass"
    return (
        f"{STEPS + 1} pushes; log-probabilities differ by {max(differences):.0e} in the steps and by {worst:.0e} after "
        f"them (by {moved:.0e} from the policy before training)"
    )

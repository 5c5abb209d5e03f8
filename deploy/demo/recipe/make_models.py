"""Recipe of deploy/demo/models: makes the tokenizer, a policy, its drafters, and the model card.

    .venv/bin/python deploy/demo/recipe/make_models.py                  from scratch (under an hour on 2 cores)
    .venv/bin/python deploy/demo/recipe/make_models.py --policy FOLDER  with an existing policy
    .venv/bin/python deploy/demo/recipe/make_models.py --family latent_moe --output deploy/demo/models/latent

The second family has the first one's tokenizer, so that both learn the same task from the same tokens.

Each problem has its own seed: from 10,000,000 on for training, and from 5,000,000 on for held-out problems. So no
problem is in both sets. All weights are stored in bfloat16, and read back before they are used or measured.
"""

import argparse
import os
import shutil
from pathlib import Path

import reasoning_gym
import torch
from card import Figures, write_card
from policy import FAMILIES, train_policy
from sampling import right_and_length, sample
from tokenizer import make_tokenizer
from train_drafters import FOLDERS, Demo, train_demo_drafter
from transformers import AutoModelForCausalLM, AutoTokenizer
from working import solution

from drafters.policy_costs import policy_costs
from drafters.registry import LearnerKind
from drafters.training.config import OfflineTraining

TASK = {"min_terms": 3, "max_terms": 4, "min_digits": 2, "max_digits": 2}
TRAINING_SEED, HELD_OUT_SEED = 10_000_000, 5_000_000
BATCH_SIZE = 64
SLIPS = 0.1
"""probability of a wrong column in the worked solutions that the policy learns from"""
TOKENIZER_TEXTS = 2000
DEMO = Path(__file__).resolve().parents[1]
DRAFTERS: dict[str, list[LearnerKind]] = {
    "qwen3_next": ["draft_model", "eagle3", "mtp"],
    "latent_moe": ["eagle3", "mtp"],
}


def main() -> None:
    arguments = read_arguments()
    torch.set_num_threads(arguments.threads)
    training = problems(TRAINING_SEED, max(BATCH_SIZE * arguments.policy_steps, arguments.samples, TOKENIZER_TEXTS))
    held_out = problems(HELD_OUT_SEED, arguments.held_out)

    for made in (*FOLDERS.values(), "README.md"):
        remove(arguments.output / made)
    folder = arguments.output / "policy"
    if arguments.policy is None:
        if arguments.family == "qwen3_next":
            first = (training[i] for i in range(TOKENIZER_TEXTS))
            texts = [problem["question"] + "\n" + solution(problem["metadata"]["expression"]) for problem in first]
            tokenizer = make_tokenizer(texts, folder)
        else:
            tokenizer = AutoTokenizer.from_pretrained(DEMO / "models" / "policy")
            tokenizer.save_pretrained(folder)
        policy = train_policy(
            arguments.family, training, held_out, tokenizer,
            steps=arguments.policy_steps, slips=SLIPS, batch_size=BATCH_SIZE,
            router_coefficient=arguments.router_coefficient, records=arguments.records,
        )  # fmt: skip
        policy.to(torch.bfloat16).save_pretrained(folder)
    else:
        AutoTokenizer.from_pretrained(arguments.policy).save_pretrained(folder)
        AutoModelForCausalLM.from_pretrained(arguments.policy, dtype=torch.bfloat16).save_pretrained(folder)
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    torch.manual_seed(arguments.seed)
    asked = [held_out[i] for i in range(arguments.held_out)]
    answers = sample(policy, tokenizer, asked, "held-out samples")
    right, length = right_and_length(held_out, asked, tokenizer, answers)
    print(
        f"policy: {right:.1%} right at temperature 1, mean response {length:.1f} tokens ({len(asked)} held-out prompts)"
    )
    samples = sample(policy, tokenizer, [training[i] for i in range(arguments.samples)], "training samples")

    demo = Demo(arguments.output, policy, samples)
    settings = OfflineTraining(steps=arguments.drafter_steps, seed=arguments.seed)
    acceptance = {}
    for kind in DRAFTERS[arguments.family]:
        acceptance[kind] = train_demo_drafter(kind, demo, answers, settings)
        print(f"{kind}: predicted acceptance length {1 + sum(acceptance[kind]):.2f}")
    write_card(
        arguments.output,
        Figures(
            family=arguments.family,
            parameters=policy.num_parameters(),
            active=policy_costs(policy.config).active_parameters,
            router_coefficient=arguments.router_coefficient,
            policy_steps=arguments.policy_steps,
            slips=SLIPS,
            batch_size=BATCH_SIZE,
            right=right,
            length=length,
            held_out=len(asked),
            samples=len(samples),
            training=settings,
            acceptance=acceptance,
            task=TASK,
            training_seed=TRAINING_SEED,
            held_out_seed=HELD_OUT_SEED,
        ),
    )


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def problems(seed: int, size: int):
    return reasoning_gym.create_dataset("chain_sum", seed=seed, size=size, **TASK)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="qwen3_next", help="architecture of the policy")
    parser.add_argument(
        "--output", type=Path, default=DEMO / "models", help="folder whose models are written, and replaced"
    )
    parser.add_argument("--policy", type=Path, help="folder of an existing policy and its tokenizer")
    parser.add_argument("--policy-steps", type=int, default=450, help="supervised training steps of the policy")
    parser.add_argument(
        "--router-coefficient", type=float, default=0.0,
        help="weight of the load-balancing loss of the policy's experts; has no effect if a token passes all of them",
    )  # fmt: skip
    parser.add_argument("--records", type=Path, help="folder for the losses and expert loads of the policy's training")
    parser.add_argument("--drafter-steps", type=int, default=240, help="training steps of each drafter")
    parser.add_argument("--samples", type=int, default=2560, help="samples of the policy that the drafters learn from")
    parser.add_argument("--held-out", type=int, default=1024, help="held-out prompts for the card's results")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling and of the drafters' training")
    return parser.parse_args()


if __name__ == "__main__":
    main()

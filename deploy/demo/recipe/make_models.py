"""Recipe of deploy/demo/models: makes the tokenizer, the policy, three drafters, and the model card.

    .venv/bin/python deploy/demo/recipe/make_models.py                  from scratch (under an hour on 2 cores)
    .venv/bin/python deploy/demo/recipe/make_models.py --policy FOLDER  with an existing policy

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
from policy import train_policy
from sampling import right_and_length, sample
from tokenizer import make_tokenizer
from train_drafters import SHAPES, Demo, train_demo_drafter
from transformers import AutoTokenizer, Qwen3NextForCausalLM
from working import solution

from drafters.training.config import OfflineTraining

TASK = {"min_terms": 3, "max_terms": 4, "min_digits": 2, "max_digits": 2}
TRAINING_SEED, HELD_OUT_SEED = 10_000_000, 5_000_000
BATCH_SIZE = 64
SLIPS = 0.1
"""probability of a wrong column in the worked solutions that the policy learns from"""
TOKENIZER_TEXTS = 2000


def main() -> None:
    arguments = read_arguments()
    torch.set_num_threads(arguments.threads)
    training = problems(TRAINING_SEED, max(BATCH_SIZE * arguments.policy_steps, arguments.samples, TOKENIZER_TEXTS))
    held_out = problems(HELD_OUT_SEED, arguments.held_out)

    shutil.rmtree(arguments.output, ignore_errors=True)
    folder = arguments.output / "policy"
    if arguments.policy is None:
        first = (training[i] for i in range(TOKENIZER_TEXTS))
        texts = [problem["question"] + "\n" + solution(problem["metadata"]["expression"]) for problem in first]
        tokenizer = make_tokenizer(texts, folder)
        policy = train_policy(
            training, held_out, tokenizer, steps=arguments.policy_steps, slips=SLIPS, batch_size=BATCH_SIZE,
            router_coefficient=arguments.router_coefficient, records=arguments.records,
        )  # fmt: skip
        policy.to(torch.bfloat16).save_pretrained(folder)
    else:
        AutoTokenizer.from_pretrained(arguments.policy).save_pretrained(folder)
        Qwen3NextForCausalLM.from_pretrained(arguments.policy, dtype=torch.bfloat16).save_pretrained(folder)
    policy = Qwen3NextForCausalLM.from_pretrained(folder, dtype=torch.float32)
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
    for kind in SHAPES:
        acceptance[kind] = train_demo_drafter(kind, demo, answers, settings)
        print(f"{kind}: predicted acceptance length {1 + sum(acceptance[kind]):.2f}")
    write_card(
        arguments.output,
        Figures(
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


def problems(seed: int, size: int):
    return reasoning_gym.create_dataset("chain_sum", seed=seed, size=size, **TASK)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    demo = Path(__file__).resolve().parents[1]
    parser.add_argument("--output", type=Path, default=demo / "models", help="folder to write; it is replaced")
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

"""Prompts: requests for groups, made from problems, with their names, seeds and metadata."""

import hashlib

from rl_loop.config import TrainConfig
from rl_loop.tasks import Split, TaskProblem
from rollout_service.protocol import MAX_COMPLETIONS, GroupRequest


def sampling_seed(seed: int, what: str, index: int) -> int:
    """A group's seed. Its completions use this number and those after it, which are all below 2^31."""
    digest = hashlib.blake2b(f"{seed} {what} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % (2**31 - MAX_COMPLETIONS)


def group_requests(
    config: TrainConfig, batch: str, split: Split, problems: dict[int, TaskProblem], completions: int, *, seed_by: str
) -> list[GroupRequest]:
    """One request for each problem. `problems`: by index in the split. Ids are the batch's name and a number."""
    return [
        GroupRequest(
            id=f"{batch}-{number:05d}",
            prompt=problem.prompt,
            messages=problem.messages,
            n=completions,
            draft_steps=True,
            routed_experts=config.router_replay and split == "train",
            sampling=config.sampling.with_seed(sampling_seed(config.seed, seed_by, number)),
            metadata={"split": split, "index": index, "prompt": problem.digest},
        )
        for number, (index, problem) in enumerate(problems.items())
    ]

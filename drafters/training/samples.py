"""Samples of the policy, which are the drafter's training data, as padded batches."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drafters.learners.learner import shifted


@dataclass(frozen=True)
class Sample:
    """One prompt and its response as token ids. A finished response ends with the end-of-sequence token."""

    prompt: list[int]
    response: list[int]


@dataclass(frozen=True)
class SampleBatch:
    """`tokens_BT`, padded on the right, and `response_BT`, the mask of response tokens."""

    tokens_BT: Tensor
    response_BT: Tensor

    def to(self, device: torch.device) -> "SampleBatch":
        return SampleBatch(self.tokens_BT.to(device), self.response_BT.to(device))

    def drafted(self, step: int) -> Tensor:
        """The mask [B, T] of rows that an engine could draft from at draft step `step`.

        At such a row the engine has at least the first response token from the policy, and the token to propose is
        within the response.
        """
        return shifted(self.response_BT, 1) & shifted(self.response_BT, 2 + step)


def collate(samples: Sequence[Sample], pad: int = 0) -> SampleBatch:
    width = max(len(sample.prompt) + len(sample.response) for sample in samples)
    tokens_BT = torch.full((len(samples), width), pad)
    response_BT = torch.zeros(len(samples), width, dtype=torch.bool)
    for row, sample in enumerate(samples):
        first, end = len(sample.prompt), len(sample.prompt) + len(sample.response)
        tokens_BT[row, :end] = torch.tensor(sample.prompt + sample.response)
        response_BT[row, first:end] = True
    return SampleBatch(tokens_BT, response_BT)


def epochs(samples: Sequence[Sample], batch_size: int, seed: int, skip: int = 0) -> Iterator[SampleBatch]:
    """Endless batches, in a new order in each epoch. Samples that do not fill the last batch of an epoch are left out.

    `skip` leaves out that many batches at the beginning, for a run that resumes.
    """
    if len(samples) < batch_size:
        raise ValueError(f"{len(samples)} samples do not fill a batch of {batch_size}")
    order, generator = list(range(len(samples))), random.Random(seed)
    while True:
        generator.shuffle(order)
        for start in range(0, len(order) - batch_size + 1, batch_size):
            if skip > 0:
                skip -= 1
            else:
                yield collate([samples[i] for i in order[start : start + batch_size]])

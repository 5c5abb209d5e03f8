"""QSNR, the quantisation signal-to-noise ratio, and the random vectors on which formats are compared."""

import math

import torch
from torch import Tensor


class Qsnr:
    """Sums over tensors and their quantised values. The ratio is one of sums, not a mean of ratios."""

    def __init__(self) -> None:
        self.noise = self.signal = 0.0

    def add(self, x: Tensor, quantised: Tensor) -> "Qsnr":
        self.noise += (quantised.double() - x.double()).square().sum().item()
        self.signal += x.double().square().sum().item()
        return self

    @property
    def db(self) -> float:
        """-10 log10(E|Q(X) - X|^2 / E|X|^2) in dB; infinite without noise."""
        return 10 * math.log10(self.signal / self.noise) if self.noise else math.inf


def qsnr(x: Tensor, quantised: Tensor) -> float:
    """The QSNR of vectors in dB."""
    return Qsnr().add(x, quantised).db


def gaussian_vectors(count: int, length: int, seed: int) -> Tensor:
    """Normal vectors (count, length), float32, each with a standard deviation that is half-normal itself.

    It is the data of variable variance of arXiv 2302.08007, which takes more than 10,000 vectors a point.
    """
    generator = torch.Generator().manual_seed(seed)
    deviations = torch.randn(count, 1, generator=generator).abs()
    return torch.randn(count, length, generator=generator) * deviations

"""Unit tests compute on tensors of a few numbers: one thread is fastest, also when other work keeps the cores busy."""

import torch

torch.set_num_threads(1)

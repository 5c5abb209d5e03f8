"""Settings of the unit tests: torch uses one thread, which is fastest for tensors of a few numbers."""

import torch

torch.set_num_threads(1)

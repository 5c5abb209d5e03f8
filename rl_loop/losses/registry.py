"""The losses by kind. This is the only place that lists them."""

from typing import TYPE_CHECKING, TypeAlias

from drafters.by_kind import by_kind
from rl_loop.losses.cispo import CISPO
from rl_loop.losses.custom_loss import CustomLoss
from rl_loop.losses.dapo import DAPO
from rl_loop.losses.dr_grpo import DrGRPO
from rl_loop.losses.grpo import GRPO
from rl_loop.losses.gspo import GSPO
from rl_loop.losses.loss import Loss

LOSSES: tuple[type[Loss], ...] = (GRPO, DrGRPO, DAPO, GSPO, CISPO)

if TYPE_CHECKING:
    AnyLoss: TypeAlias = Loss
else:
    AnyLoss = by_kind(LOSSES, other=CustomLoss)

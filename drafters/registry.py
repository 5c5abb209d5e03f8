"""The kinds of drafter by name, to serve and to train; the only file that lists them.

To serve a new kind, write a file in `drafters/kinds/` with its class and add the class to KINDS. To train it, write a
file in `drafters/learners/` with its learner and add a line to LEARNERS. If the kind has settings of its own, add their
class to the bases of `DrafterConfig`. If a new drafter of the kind has a shape to choose, add its class to the bases of
`HeadShape`.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from drafters.drafter import Drafter
from drafters.kinds.draft_model import DraftModelDrafter, DraftModelShape
from drafters.kinds.eagle3 import Eagle3Drafter, Eagle3Shape
from drafters.kinds.mtp import MTPDrafter
from drafters.kinds.ngram import NGramDrafter, NGramSettings
from drafters.kinds.none import NoDrafter

KINDS: dict[str, type[Drafter]] = {
    kind.kind: kind for kind in (NoDrafter, NGramDrafter, DraftModelDrafter, Eagle3Drafter, MTPDrafter)
}
"""`drafters inspect` asks the last kind first. Any language model can be a draft model, so that kind comes early"""

LEARNERS = {
    "eagle3": "drafters.learners.eagle3_head:Eagle3Head",
    "mtp": "drafters.learners.mtp_head:MTPHead",
    "draft_model": "drafters.learners.small_model:DraftModel",
}
"""module:class of each kind's learner, as text: reading a configuration must not import torch"""

if TYPE_CHECKING:
    LearnerKind = str
    LearnerKindOrNone = str
else:  # `--help` and the errors of a configuration list the kinds
    LearnerKind = Literal[tuple(LEARNERS)]
    LearnerKindOrNone = Literal[NoDrafter.kind, *LEARNERS]


class DrafterConfig(NGramSettings):
    """The drafter that proposes tokens, and how many it proposes."""

    kind: str = Field(default=NoDrafter.kind, description=f"one of {', '.join(KINDS)}; kind none reads no other field")


class HeadShape(Eagle3Shape, DraftModelShape):
    """The shape of a new drafter. A drafter from `init` keeps its own shape."""

    def check_reader(self, kind: LearnerKind, *, is_new: bool) -> None:
        """Raises ValueError for a field that is given but not read: by the kind, or because the drafter is not new."""
        own = KINDS[kind].shape.model_fields if is_new else ()
        where = f"kind = {kind!r}" if is_new else "init, whose drafter has its own shape"
        self.refuse_unread([name for name in type(self).model_fields if name not in own], where)


def make_drafter(config: DrafterConfig) -> Drafter:
    """The configured drafter. Raises ValueError, which names the field, when the kind is unknown."""
    if config.kind not in KINDS:
        raise ValueError(f"drafter.kind: unknown kind {config.kind!r}; the kinds are {', '.join(KINDS)}")
    return KINDS[config.kind](config)

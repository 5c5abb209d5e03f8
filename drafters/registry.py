"""The kinds of drafter by name, to serve and to train; the only file that lists them.

To serve a new kind: a file in `drafters/kinds/` with its class, and the class among KINDS. To train it: a file in
`drafters/learners/` with its learner, and a line of LEARNERS. A kind with settings of its own, or of the shape of a new
one, names them as a base class of `DrafterConfig` or `HeadShape` too.
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
"""`drafters inspect` asks the last one first: a draft model, which any language model can be, stands before others"""

LEARNERS = {
    "eagle3": "drafters.learners.eagle3_head:Eagle3Head",
    "mtp": "drafters.learners.mtp_head:MTPHead",
    "draft_model": "drafters.learners.small_model:DraftModel",
}
"""module:class of each kind's learner; named, not imported, so that a configuration is read without torch"""

if TYPE_CHECKING:
    LearnerKind = str
    LearnerKindOrNone = str
else:  # a configuration's error and `--help` name the kinds
    LearnerKind = Literal[tuple(LEARNERS)]
    LearnerKindOrNone = Literal[NoDrafter.kind, *LEARNERS]


class DrafterConfig(NGramSettings):
    """Which drafter proposes tokens, and how many."""

    kind: str = Field(default=NoDrafter.kind, description=f"one of {', '.join(KINDS)}; none reads no other field")


class HeadShape(Eagle3Shape, DraftModelShape):
    """The shape of a new drafter; a drafter that is continued keeps its own."""

    def check_reader(self, kind: LearnerKind, *, is_new: bool) -> None:
        """Raises ValueError for a field that is given and means nothing to the kind, or to a drafter that has a
        shape."""
        own = KINDS[kind].shape.model_fields if is_new else ()
        where = f"kind = {kind!r}" if is_new else "init, whose drafter has its own shape"
        self.refuse_unread([name for name in type(self).model_fields if name not in own], where)


def make_drafter(config: DrafterConfig) -> Drafter:
    """The configured drafter. Raises ValueError naming the field when the kind is unknown."""
    if config.kind not in KINDS:
        raise ValueError(f"drafter.kind: unknown kind {config.kind!r}; known are {', '.join(KINDS)}")
    return KINDS[config.kind](config)

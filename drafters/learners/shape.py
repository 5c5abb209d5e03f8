"""Which kinds of drafter can be trained, and the shape of a new one. Imports no torch."""

from typing import Literal

from pydantic import Field

from drafters.settings import Section

LearnerKind = Literal["eagle3", "mtp", "draft_model"]

OF_KIND: dict[LearnerKind, tuple[str, ...]] = {
    "eagle3": ("policy_layers", "vocabulary_size", "intermediate_size"),
    "mtp": (),
    "draft_model": ("hidden_size", "layers"),
}
"""fields of HeadShape"""


class HeadShape(Section):
    """The shape of a new drafter; a drafter that is continued keeps its own."""

    policy_layers: list[int] = Field(default_factory=list)
    """eagle3: ids of the policy's hidden states (0: embeddings, N: output of the last layer); vLLM's when not given"""
    vocabulary_size: int = Field(default=0, ge=0)
    """eagle3: draft only the most frequent tokens of the data, this many; 0 for all"""
    intermediate_size: int = Field(default=0, ge=0)
    """eagle3: width of the feed-forward part; 0 for twice the policy's width"""
    hidden_size: int = Field(default=0, ge=0, multiple_of=32)
    """draft_model: its width; 0 for half the policy's"""
    layers: int = Field(default=2, ge=1)
    """draft_model: its layers"""

    def check_reader(self, kind: LearnerKind, *, is_new: bool) -> None:
        """Raises ValueError for a field that is given and means nothing to the kind, or to a drafter that has a
        shape."""
        own = OF_KIND[kind] if is_new else ()
        where = f"kind = {kind!r}" if is_new else "init, whose drafter has its own shape"
        self.refuse_unread([name for name in type(self).model_fields if name not in own], where)

"""The kinds of drafter by name; the only place that lists them."""

from drafters.drafter import Drafter, DrafterConfig
from drafters.kinds.draft_model import DraftModelDrafter
from drafters.kinds.eagle3 import Eagle3Drafter
from drafters.kinds.mtp import MTPDrafter
from drafters.kinds.ngram import NGramDrafter
from drafters.kinds.none import NoDrafter

KINDS: dict[str, type[Drafter]] = {
    kind.kind: kind for kind in (NoDrafter, NGramDrafter, DraftModelDrafter, Eagle3Drafter, MTPDrafter)
}


def make_drafter(config: DrafterConfig) -> Drafter:
    """The configured drafter. Raises ValueError naming the field when the kind is unknown."""
    if config.kind not in KINDS:
        raise ValueError(f"drafter.kind: unknown kind {config.kind!r}; known are {', '.join(KINDS)}")
    return KINDS[config.kind](config)

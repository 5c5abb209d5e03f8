"""The kinds of drafter by name; the only place that lists them."""

from drafters.draft_model import DraftModelDrafter
from drafters.drafter import Drafter, DrafterConfig
from drafters.eagle3 import Eagle3Drafter
from drafters.mtp import MTPDrafter
from drafters.ngram import NGramDrafter
from drafters.none import NoDrafter

KINDS: dict[str, type[Drafter]] = {
    kind.kind: kind for kind in (NoDrafter, NGramDrafter, DraftModelDrafter, Eagle3Drafter, MTPDrafter)
}


def make_drafter(config: DrafterConfig) -> Drafter:
    """The configured drafter. Raises ValueError naming the field when the kind is unknown."""
    if config.kind not in KINDS:
        raise ValueError(f"drafter.kind: unknown kind {config.kind!r}; known are {', '.join(KINDS)}")
    return KINDS[config.kind](config)

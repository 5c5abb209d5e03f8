"""N-gram drafts: what followed the last few tokens earlier in the same text. No weights, nothing to train."""

from typing import Any

from drafters.drafter import Drafter


class NGramDrafter(Drafter):
    kind = "ngram"
    reads = "prompt_lookup_max", "prompt_lookup_min"
    samples = False

    def speculative_config(self) -> dict[str, Any] | None:
        return {
            "method": "ngram",
            "num_speculative_tokens": self.config.draft_tokens,
            "prompt_lookup_max": self.config.prompt_lookup_max,
            "prompt_lookup_min": self.config.prompt_lookup_min,
        }

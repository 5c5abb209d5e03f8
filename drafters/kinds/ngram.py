"""N-gram drafts: the tokens that followed the last few tokens earlier in the same text. No weights, no training."""

from typing import Any

from pydantic import Field

from drafters.drafter import Drafter, DraftSettings
from drafters.runners import OnRunner


class NGramSettings(DraftSettings):
    prompt_lookup_max: int = Field(default=4, ge=1)
    """ngram: largest number of last tokens to look up in the text so far"""
    prompt_lookup_min: int = Field(default=2, ge=1)
    """ngram: smallest number of last tokens to look up"""


class NGramDrafter(Drafter):
    kind = "ngram"
    options = NGramSettings
    samples = False
    on = {  # noqa: RUF012
        "v1": OnRunner(rests=True, fills=False),
        "v2": OnRunner(method="ngram_gpu", rests=True),  # vLLM fills short finds up with the last token
    }
    config: NGramSettings

    def speculative_config(self) -> dict[str, Any] | None:
        return {
            "method": "ngram",
            "num_speculative_tokens": self.config.draft_tokens,
            "prompt_lookup_max": self.config.prompt_lookup_max,
            "prompt_lookup_min": self.config.prompt_lookup_min,
        }

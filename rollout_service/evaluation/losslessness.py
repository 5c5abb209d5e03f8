"""The losslessness z-score of generated groups: the policy's distribution is recomputed by transformers in float32."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from drafters.scoring import SurprisalSums, score_tokens
from rollout_service.evaluation.config import CompareConfig
from rollout_service.protocol import Group

TOKENS_A_FORWARD = 8192


class Recomputation:
    """The policy as transformers computes it, in float32."""

    def __init__(self, folder: Path, config: CompareConfig):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.cut: dict[str, Any] = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}

    @torch.no_grad()
    def sums(self, groups: list[Group], advance: Callable[[int], None] = lambda tokens: None) -> SurprisalSums:
        """Sums of surprisal, entropy and variance over all response tokens. `advance` hears of finished tokens."""
        pairs = [(g.prompt_token_ids, c.token_ids) for g in groups for c in g.completions if c.token_ids]
        pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        sums = SurprisalSums()
        while pairs:
            width = len(pairs[-1][0]) + len(pairs[-1][1])
            count = max(1, TOKENS_A_FORWARD // width)
            batch, pairs = pairs[-count:], pairs[:-count]
            ids_BT = torch.zeros(len(batch), width, dtype=torch.long)
            mask_BT = torch.zeros_like(ids_BT)
            for row, (prompt, response) in enumerate(batch):
                ids_BT[row, : len(prompt) + len(response)] = torch.tensor(prompt + response)
                mask_BT[row, : len(prompt) + len(response)] = 1
            logits_BTV = self.model(input_ids=ids_BT, attention_mask=mask_BT).logits
            at = [(r, len(p) + i) for r, (p, response) in enumerate(batch) for i in range(len(response))]
            rows, columns = torch.tensor(at).unbind(1)
            sums += SurprisalSums.of(score_tokens(logits_BTV[rows, columns - 1], ids_BT[rows, columns], **self.cut))
            advance(len(at))
        return sums

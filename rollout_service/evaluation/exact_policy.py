"""The exact policy: transformers' distributions, against which samples are tested. Results are on the CPU."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import drafters.attention
import drafters.latent_moe  # noqa: F401  (which transformers then knows)
from drafters.chunked_scoring import score_logits
from drafters.devices import choose_device
from drafters.policy_head import PolicyHead
from drafters.scoring import TokenScores
from rollout_service.evaluation.cut import Cut
from rollout_service.evaluation.float64 import InFloat64
from rollout_service.evaluation.recomputation_config import RecomputationConfig
from rollout_service.evaluation.router_margins import Flip, choosing_routers, recorded_margins

TOKENS_A_FORWARD = 8192


class Response(NamedTuple):
    """Token ids of a prompt and of its response (at least one)."""

    prompt: list[int]
    tokens: list[int]


class Recomputation:
    routers: Sequence[nn.Module] = ()
    """the policy's routers that leave experts out; a policy without any has no margins"""

    def __init__(self, folder: Path, config: RecomputationConfig | None = None, dtype: torch.dtype | None = None):
        """`dtype`: instead of the configured one. Raises ValueError when there is no such device."""
        self.folder, self.config = folder, config or RecomputationConfig()
        self.device = choose_device(self.config.device, "recomputation.device")
        self.dtype = dtype or getattr(torch, self.config.dtype)
        # torch has no grouped product in float64, so experts are computed one by one.
        experts = {"experts_implementation": "eager"} if self.dtype == torch.float64 else {}
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype, **experts)
        self.model = model.to(self.device).eval()
        self.head = PolicyHead(self.model)
        self.routers = choosing_routers(self.model.get_decoder())
        self.vocabulary: int = self.model.config.get_text_config().vocab_size

    @cache  # noqa: B019  (a command has one recomputation, until it ends)
    def in_float64(self) -> "Recomputation":
        """The same policy with every operation in float64, for the few tokens at which float32 is not exact enough."""
        return Recomputation(self.folder, self.config, torch.float64)

    def scores(
        self, responses: Sequence[Response], cut: Cut, advance: Callable[[int], None] = lambda tokens: None
    ) -> list[TokenScores]:
        """The scores of each response's tokens, in the order of the responses. `advance` is called with the number of
        tokens that were finished."""
        return self._scored(responses, self._logits(responses), cut, advance)

    def scores_and_margins(self, responses: Sequence[Response], cut: Cut) -> tuple[list[TokenScores], list[Tensor]]:
        """Of a policy with `routers`: the scores of each response's tokens, and of each response the routers' margins
        (router_margins.py), float32 (T,). Each is the least over the layers. T counts the tokens that predict others:
        prompt and response without the last token."""
        margins: dict[int, Tensor] = {}
        scores = self._scored(responses, self._logits(responses, margins), cut)
        return scores, [margins[index] for index in range(len(responses))]

    def with_flips(self, response: Response, cut: Cut, flips: frozenset[Flip]) -> tuple[TokenScores, Tensor]:
        """The scores of the tokens, and the margins of each layer (L, T), where routers choose as `flips` say."""
        with recorded_margins(self.routers, flips) as of_layers:
            (scores,) = self.scores([response], cut)
        return scores, torch.stack(of_layers)[:, :-1].cpu()

    def _scored(
        self, responses: Sequence[Response], logits: Iterable[tuple[int, Tensor]], cut: Cut,
        advance: Callable[[int], None] = lambda tokens: None,
    ) -> list[TokenScores]:  # fmt: skip
        by_index: dict[int, TokenScores] = {}
        for index, logits_NV in logits:
            tokens_N = torch.tensor(responses[index].tokens, device=logits_NV.device)
            by_index[index] = score_logits(logits_NV, tokens_N, **cut.arguments()).cpu()
            advance(len(tokens_N))
        return [by_index[index] for index in range(len(responses))]

    def runner_up_margins(self, responses: Sequence[Response]) -> list[Tensor]:
        """For each response: how far each token's logit is above the best other one, in nats (negative: it is not the
        best)."""
        margins: dict[int, Tensor] = {}
        for index, logits_NV in self._logits(responses):
            tokens_N1 = torch.tensor(responses[index].tokens, device=logits_NV.device)[:, None]
            own_N = logits_NV.gather(1, tokens_N1).squeeze(1)
            margins[index] = (own_N - logits_NV.scatter(1, tokens_N1, -torch.inf).amax(1)).cpu()
        return [margins[index] for index in range(len(responses))]

    def edge_gaps(self, responses: Sequence[Response], cut: Cut) -> list[Tensor]:
        """For each response: how near some token is to the edge of top-k (in nats between the last kept token and the
        next) or of top-p (in probability). If that is within rounding error, an engine may rightly cut one token more
        or fewer."""
        gaps: dict[int, Tensor] = {}
        for index, logits_NV in self._logits(responses):
            descending_NV = (logits_NV.float() / cut.temperature).sort(1, descending=True).values
            gap_N = torch.full((len(logits_NV),), torch.inf, device=logits_NV.device)
            if 0 < cut.top_k < logits_NV.shape[1]:
                gap_N = descending_NV[:, cut.top_k - 1] - descending_NV[:, cut.top_k]
                descending_NV = descending_NV[:, : cut.top_k]
            if cut.top_p < 1.0:
                gap_N = gap_N.minimum((descending_NV.softmax(1).cumsum(1) - cut.top_p).abs().amin(1))
            gaps[index] = gap_N.cpu()
        return [gaps[index] for index in range(len(responses))]

    def next_logits(self, prompts: Sequence[list[int]]) -> Tensor:
        """The logits of the token that follows each prompt, float32 (len(prompts), V)."""
        by_index = dict(self._logits([Response(prompt, [0]) for prompt in prompts]))
        return torch.cat([by_index[index] for index in range(len(prompts))]).float().cpu()

    @torch.no_grad()
    def _logits(
        self, responses: Sequence[Response], margins: dict[int, Tensor] | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """(index, logits (N, V) at the positions that predict its N tokens), longest responses first. The logits of one
        response are in memory at a time. `margins`, if given, is filled with the margins (T,) of each response."""
        order = sorted(range(len(responses)), key=lambda i: -len(responses[i].prompt) - len(responses[i].tokens))
        while order:
            width = sum(map(len, responses[order[0]]))
            count = max(1, TOKENS_A_FORWARD // width)
            batch, order = order[:count], order[count:]
            ids_BT = torch.zeros(len(batch), width, dtype=torch.long)
            mask_BT = torch.zeros_like(ids_BT)
            for row, index in enumerate(batch):
                ids = responses[index].prompt + responses[index].tokens
                ids_BT[row, : len(ids)], mask_BT[row, : len(ids)] = torch.tensor(ids), 1
            with self._computing(), recorded_margins(self.routers if margins is not None else ()) as of_layers:
                decoded = self.model.get_decoder()(
                    input_ids=ids_BT.to(self.device), attention_mask=mask_BT.to(self.device), use_cache=False
                )
            if margins is not None:
                least_BT = torch.stack(of_layers).amin(0).view_as(ids_BT).cpu()
                for row, index in enumerate(batch):
                    margins[index] = least_BT[row, : sum(map(len, responses[index])) - 1]
            for row, index in enumerate(batch):
                start = len(responses[index].prompt) - 1
                with self._computing():
                    logits_NV = self.head(decoded.last_hidden_state[row, start : start + len(responses[index].tokens)])
                yield index, logits_NV

    def _computing(self) -> AbstractContextManager[Any]:
        return InFloat64() if self.dtype == torch.float64 else nullcontext()

"""`token` beside `token_id` in the log-probabilities of /inference/v1/generate, which clients read by either name.

vLLM 0.32 names a token by `token_id: 20`. Clients written for the releases before it read `token: "token_id:20"`:
verifiers' renderers refuse an answer without it, and TRL fails. The answer has both.

vLLM also makes an object of each log-probability, and reads it again for the answer. Here it is put into the answer as
it is. An answer of 72 tokens then takes 0.25 ms of a processor in the place of 0.45, of which writing its JSON is 0.18.
"""

import json
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

from pydantic_core import to_json

from rollout_service.vllm_plugin.patch import Patch

MODULE = "vllm.entrypoints.scale_out.token_in_token_out.serving"
NAME = f"{MODULE}.ServingTokens._create_tokens_logprobs"
LEAST = -9999.0
"""what stands for a log-probability that is not a number or minus infinite, as in vLLM's"""


def name_tokens() -> None:
    """Let vLLM's handler answer with both names."""
    serving: Any = import_module(MODULE)

    class Answer(serving.GenerateTokensResponse):
        def model_dump(self, **more: Any) -> dict[str, Any]:
            return with_logprobs(self, super().model_dump(**more, exclude=WITHOUT_LOGPROBS))

    class Chunk(serving.GenerateTokensStreamResponse):
        def model_dump_json(self, exclude: set[str] | None = None, **more: Any) -> str:
            without = WITHOUT_LOGPROBS | dict.fromkeys(exclude or (), True)
            dumped = with_logprobs(self, super().model_dump(mode="json", exclude=without, **more))
            return to_json(dumped).decode()

    def _create_tokens_logprobs(
        self: Any, token_ids: Sequence[int], top_logprobs: Any, num_output_top_logprobs: int | None = None
    ) -> Any:
        content = list(named(token_ids, top_logprobs, num_output_top_logprobs))
        return serving.GenerateLogProbs.model_construct(content=content)

    # pydantic and vLLM's log show these names.
    Answer.__name__, Chunk.__name__ = "GenerateTokensResponse", "GenerateTokensStreamResponse"
    serving.GenerateTokensResponse, serving.GenerateTokensStreamResponse = Answer, Chunk
    serving.ServingTokens._create_tokens_logprobs = _create_tokens_logprobs


WITHOUT_LOGPROBS: dict[str, Any] = {"choices": {"__all__": {"logprobs"}}}


def with_logprobs(answer: Any, dumped: dict[str, Any]) -> dict[str, Any]:
    for choice, made in zip(answer.choices, dumped["choices"], strict=True):
        made["logprobs"] = choice.logprobs and {"content": choice.logprobs.content}
    return dumped


def named(token_ids: Sequence[int], top_logprobs: Any, count: int | None) -> Iterator[dict[str, Any]]:
    """One entry for each sampled token. `count`: how many of the most likely tokens each lists, -1 for all, as vLLM's
    `logprobs`. The sampled token is listed first. `top_logprobs`: vLLM's, flat or one dictionary for each position."""
    from vllm.logprobs import FlatLogprobs

    if isinstance(top_logprobs, FlatLogprobs) and count in (0, 1):  # only the sampled token is listed: the usual case
        logprobs, ranks = top_logprobs.logprobs, top_logprobs.ranks
        for token_id, start in zip(token_ids, top_logprobs.start_indices, strict=True):
            sampled = entry(token_id, logprobs[start], ranks[start])
            yield {**sampled, "top_logprobs": [sampled]}
        return
    most = None if count == -1 else max(count or 0, 1)
    for token_id, position in zip(token_ids, top_logprobs, strict=True):
        listed = {known: entry(known, found.logprob, found.rank) for known, found in (position or {}).items()}
        if (found := listed.get(token_id)) is None:
            yield {**entry(token_id, LEAST, None), "top_logprobs": []}
        else:
            yield {**found, "top_logprobs": list(listed.values())[:most] if count is not None else []}


def entry(token_id: int, logprob: float, rank: int | None) -> dict[str, Any]:
    shown = logprob if logprob >= LEAST else LEAST  # false for what is not a number
    return {"token_id": token_id, "token": f"token_id:{token_id}", "logprob": shown, "rank": rank or None}


def tokens_have_both_names() -> bool:
    """An answer and a chunk have both names, for the sampled token and for the others."""
    from vllm.logprobs import Logprob

    serving: Any = import_module(MODULE)
    handler = serving.ServingTokens.__new__(serving.ServingTokens)
    made = handler._create_tokens_logprobs([7], [{7: Logprob(-1.0, 2), 8: Logprob(-0.5, 1)}], 2)
    answer = serving.GenerateTokensResponse(choices=[{"index": 0, "token_ids": [7], "logprobs": made}])
    chunk = serving.GenerateTokensStreamResponse(choices=[{"index": 0, "token_ids": [7], "logprobs": made}])
    return all(
        (place["token_id"], place["token"]) == (7, "token_id:7")
        and [(top["token_id"], top["token"]) for top in place["top_logprobs"]] == [(7, "token_id:7"), (8, "token_id:8")]
        for dumped in (answer.model_dump(), json.loads(chunk.model_dump_json(exclude={"metrics"})))
        for place in dumped["choices"][0]["logprobs"]["content"]
    )


WHOLE, STREAM = (f"{MODULE}.ServingTokens.serve_tokens_{kind}_generator" for kind in ("full", "stream"))
TOKEN_NAMES = Patch(
    NAME,
    "it names a token by token_id only, where verifiers and TRL read token, and makes two objects of each",
    when="in each engine's actor, on every device, once vLLM's routes are used",
    unneeded="log-probabilities of /inference/v1/generate have token and token_id",
    apply=name_tokens,
    is_right=tokens_have_both_names,
    relies_on={NAME: "self, token_ids, top_logprobs, num_output_top_logprobs"},
    looked_up_in={WHOLE: "GenerateTokensResponse", STREAM: "GenerateTokensStreamResponse"},
)

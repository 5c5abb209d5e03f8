"""What vLLM's handler of /inference/v1/generate lacks: names of tokens, and a response's length and text."""

from types import SimpleNamespace

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.logprobs import FlatLogprobs, Logprob

from rollout_service.vllm_plugin.generate_parameters import adapt_parameters
from rollout_service.vllm_plugin.token_names import named

ROWS = [([7, 7, 8], [-0.5, -0.5, -1.0]), ([9, 8, 7], [-2.0, -0.25, float("-inf")]), ([8, 7, 9], [float("nan"), -1, -2])]
"""what the engine reports of three positions: the sampled token, then the most likely ones"""


@pytest.mark.parametrize("count", [0, 1, 2, -1, None])
def test_flat_and_other_log_probabilities_make_the_same_entries(count):
    flat, positions = FlatLogprobs(), []
    for tokens, logprobs in ROWS:
        flat.append_fast(tokens, logprobs, iter([3, 1, 2]), [None] * 3)
        ranks = [3, 1, 2]
        positions.append({t: Logprob(p, r) for t, p, r in zip(tokens, logprobs, ranks, strict=True)})
    found = list(named([7, 9, 8], flat, count))
    if count not in (0, 1):  # there the sampled token's rank is given, elsewhere that of its place among the likely
        assert found == list(named([7, 9, 8], positions, count))
    assert [(entry["token"], entry["logprob"]) for entry in found] == [
        ("token_id:7", -0.5), ("token_id:9", -2.0), ("token_id:8", -9999.0)
    ]  # fmt: skip
    listed = {0: 1, 1: 1, 2: 2, -1: 3, None: 0}[count]
    assert [len(entry["top_logprobs"]) for entry in found[1:]] == [listed, listed]


def test_a_sampled_token_that_was_not_reported_has_the_least_log_probability():
    (entry,) = named([5], [{7: Logprob(-0.5, 1)}], 1)
    assert entry == {"token_id": 5, "token": "token_id:5", "logprob": -9999.0, "rank": None, "top_logprobs": []}


@pytest.fixture
def handler():
    """It takes 100 tokens of prompt and response, and answers with the request that it got."""

    async def serve_tokens(request, raw_request):
        return request

    handler = SimpleNamespace(
        serve_tokens=serve_tokens,
        model_config=SimpleNamespace(max_model_len=100, is_multimodal_model=False),
    )
    adapt_parameters(handler)
    return handler


def asked(tokens=10, output_mode="tokens", **params):
    given = {"token_ids": [1] * tokens, "output_mode": output_mode, "features": None, "content_parts": None}
    return SimpleNamespace(**given, sampling_params=SamplingParams(**params))


async def test_a_response_has_the_room_that_is_left(handler):
    for tokens, given, used in ((10, 5, 5), (10, 90, 90), (10, 1000, 90), (99, 16, 1), (10, None, None)):
        request = await handler.serve_tokens(asked(tokens, max_tokens=given))
        assert request.sampling_params.max_tokens == used
    for tokens in (100, 101):
        with pytest.raises(VLLMValidationError, match=f"has {tokens} tokens, .* may have 100") as refused:
            await handler.serve_tokens(asked(tokens))
        assert refused.value.parameter == "token_ids"


@pytest.mark.parametrize(
    ("output_mode", "params", "flat", "decoded"),
    [
        ("tokens", {}, True, False),
        ("tokens", {"stop": ["a"]}, True, True),
        ("tokens", {"prompt_logprobs": 1}, False, True),
        ("text", {}, False, True),
    ],
)
async def test_text_is_made_only_where_it_is_read(handler, output_mode, params, flat, decoded):
    params = (await handler.serve_tokens(asked(output_mode=output_mode, **params))).sampling_params
    assert (params.flat_logprobs, params.detokenize) == (flat, decoded)


async def test_media_are_refused_unless_the_policy_reads_them(handler):
    request = asked()
    request.content_parts = [{"type": "image_url"}]
    with pytest.raises(VLLMValidationError, match="this policy reads text only") as refused:
        await handler.serve_tokens(request)
    assert refused.value.parameter == "content_parts"
    handler.model_config.is_multimodal_model = True
    assert await handler.serve_tokens(request) is request

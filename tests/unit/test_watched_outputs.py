"""Outputs of vLLM's engine are collected by choice, and only for requests that ask for it."""

from types import SimpleNamespace

import pytest
from vllm import SamplingParams
from vllm.logprobs import FlatLogprobs, Logprob

from rollout_service.vllm_plugin.unsendable import refuse_what_cannot_be_sent
from rollout_service.vllm_plugin.watched_outputs import WATCHED, Sampled, Watched, sampled_logprobs, watch_outputs


def piece(index, tokens, finish_reason=None):
    logprobs = [{token: Logprob(-float(token)), 99: Logprob(-0.1)} for token in tokens]
    return SimpleNamespace(index=index, token_ids=tokens, logprobs=logprobs, finish_reason=finish_reason)


class Engine:
    """Its choices interleave, as in a stream."""

    def __init__(self):
        self.asked, self.order = [], []

    def generate(self, prompt, params, request_id):
        self.order.append(request_id)
        self.asked.append(params)
        return self.outputs()

    async def outputs(self):
        for pieces in ([piece(0, [1, 2])], [piece(1, [3])], [piece(1, [], "stop"), piece(0, [4], "length")]):
            yield SimpleNamespace(prompt_token_ids=[5], outputs=pieces)


def watched(engine):
    finished = []

    def ends(prompt_token_ids, output, sampled):
        finished.append((prompt_token_ids, output.index, sampled))
        return f"record {output.index}"

    watch_outputs(engine, ends)
    return finished


@pytest.fixture
def request_on_vllms_routes():
    token = WATCHED.set(found := Watched(recorded=True))
    yield found
    WATCHED.reset(token)


async def test_the_pieces_of_each_choice_are_put_together(request_on_vllms_routes):
    engine = Engine()
    finished = watched(engine)
    params = SamplingParams(n=2)
    assert [len(o.outputs) async for o in engine.generate("prompt", params, "a")] == [1, 1, 2]
    assert finished == [
        ([5], 1, Sampled([3], [-3.0])),
        ([5], 0, Sampled([1, 2, 4], [-1.0, -2.0, -4.0])),
    ]
    assert request_on_vllms_routes.calls == [{1: "record 1", 0: "record 0"}]
    assert request_on_vllms_routes.n == 2


async def test_calls_are_in_the_order_of_the_prompts_also_behind_another_wrapper(request_on_vllms_routes):
    """vLLM's handlers call `generate` for each prompt, and read the outputs in any order."""
    engine = Engine()
    watched(engine)
    refuse_what_cannot_be_sent(engine)
    first, second = (engine.generate("prompt", SamplingParams(), name) for name in "ab")
    for outputs in (second, first):
        async for _ in outputs:
            pass
    assert engine.order == ["a", "b"]
    assert len(request_on_vllms_routes.calls) == 2


async def test_a_record_makes_the_engine_report_log_probabilities_that_the_handler_does_not_see(
    request_on_vllms_routes,
):
    engine = Engine()
    watched(engine)
    for given, asked in (
        (SamplingParams(), (0, True)),
        (SamplingParams(prompt_logprobs=1), (0, False)),  # the handler reads those of the prompt
        (SamplingParams(logprobs=2), (2, False)),
    ):
        before = given.logprobs
        engine.generate("prompt", given, "a")
        assert (engine.asked[-1].logprobs, engine.asked[-1].flat_logprobs) == asked
        assert given.logprobs == before


async def test_without_a_record_outputs_are_counted_and_not_collected(request_on_vllms_routes):
    request_on_vllms_routes.recorded = False
    engine = Engine()
    finished = watched(engine)
    params = SamplingParams()
    async for _ in engine.generate("prompt", params, "a"):
        pass
    assert [(index, sampled) for _, index, sampled in finished] == [(1, None), (0, None)]
    assert engine.asked == [params]


async def test_other_calls_are_vllms_own():
    engine = Engine()
    finished = watched(engine)
    params = SamplingParams()
    async for _ in engine.generate("prompt", params, "a"):
        pass
    assert finished == []
    assert engine.asked == [params]


def test_flat_log_probabilities_are_read_alike():
    flat = FlatLogprobs()
    for token in (1, 2):
        flat.append_fast([token, 99], [-float(token), -0.1], iter([2, 1]), [None, None])
    assert sampled_logprobs(SimpleNamespace(token_ids=[1, 2], logprobs=flat)) == [-1.0, -2.0]
    assert sampled_logprobs(SimpleNamespace(token_ids=[2], logprobs=flat[-1:])) == [-2.0]

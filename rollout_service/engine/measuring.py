"""Measurement of step costs and acceptance in a running engine, for a calibration or when the engine starts."""

import asyncio
import random
import uuid
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from vllm.v1.metrics.loggers import PrometheusStatLogger

from drafters.schedule import StepCosts
from rollout_service.engine.draft_lengths import DraftLengths
from rollout_service.engine.step_costs import Measured, StepKind, StepTimes, fastest

if TYPE_CHECKING:
    from vllm import SamplingParams

WARM_UP_TOKENS = 16
UNCOUNTED = 5
"""first steps of a batch that are not counted: some process prompts, and the first decoding step follows one of them"""
START_STEPS, MOST_START_STEPS = 3, 100
"""least and most steps that an engine measures for each batch size and draft length when it starts, twice"""
START_PROMPT = 8
"""tokens of the random prompts with which it measures"""


class Plan(BaseModel):
    """What to measure: every draft length at every batch size."""

    prompts: list[list[int]]
    """token ids, used in turn"""
    batch_sizes: list[int]
    draft_lengths: list[int] | None
    """None for an engine without a drafter, which is measured as draft length 0"""
    steps: int
    """least number of steps for each batch size and draft length"""
    most_steps: int | None = None
    """if given, up to so many steps are measured, until the cost is known exactly enough (step_costs.py)"""
    warm_up: bool = True
    """whether to generate a little first, because an engine's first steps compile and allocate"""
    responses: int = 0
    """completions over which acceptance is counted, with the longest drafts; the policy ends them"""
    response_tokens: int = 256
    """most tokens of such a completion"""
    temperature: float = 1.0


async def measure(llm: Any, times: StepTimes, lengths: DraftLengths, plan: Plan) -> Measured:
    """Run the plan on an engine that does nothing else. Afterwards it has its earlier draft lengths again."""
    timed, counted = Measured(), Measured()
    async with lengths.held() as hold:
        if plan.warm_up:
            await _generate(llm, plan, max(plan.batch_sizes), WARM_UP_TOKENS)
        try:
            times.measured = timed
            for batch in plan.batch_sizes:
                for drafts in plan.draft_lengths or [0]:
                    if plan.draft_lengths is not None:
                        await hold(drafts)
                    times.ask(StepKind(batch, drafts), plan.steps, precisely=plan.most_steps is not None)
                    tokens = tokens_of_steps(plan.most_steps or plan.steps, drafts)
                    await _generate(llm, plan, batch, tokens, until=times.enough)
            # Drafts past the end of a response say nothing about responses, so acceptance is counted by itself.
            times.measured = counted
            if plan.draft_lengths is not None:
                await hold(max(plan.draft_lengths))
            await _generate(llm, plan, plan.responses, plan.response_tokens, to_the_end=True)
        finally:
            times.measured = None
    return Measured(timed.seconds, timed.first, counted.drafted, counted.accepted)


async def measure_at_start(llm: Any, times: StepTimes, lengths: DraftLengths, context_limit: int) -> StepCosts:
    """What a step costs at every draft length, measured with random prompts. Takes some seconds."""
    draft_tokens, largest = lengths.config.draft_tokens, lengths.batches
    length = max(1, min(START_PROMPT, context_limit - tokens_of_steps(START_STEPS, draft_tokens)))
    room = (context_limit - length) // (draft_tokens + 1) - UNCOUNTED
    draw, vocabulary = random.Random(0), llm.model_config.get_vocab_size()
    plan = Plan(
        prompts=[[draw.randrange(vocabulary) for _ in range(length)] for _ in range(largest)],
        batch_sizes=sorted({*(4**i for i in range(8) if 4**i < largest), largest}),
        draft_lengths=list(range(draft_tokens + 1)),
        steps=START_STEPS,
        most_steps=max(START_STEPS, min(MOST_START_STEPS, room)),
    )
    # Twice, because a machine that is busy for half a second makes all lengths measured meanwhile look slow.
    passes = [
        await measure(llm, times, lengths, plan),
        await measure(llm, times, lengths, plan.model_copy(update={"warm_up": False})),
    ]
    return fastest([measured.costs(plan.batch_sizes, draft_tokens) for measured in passes])


def served_metrics(times: StepTimes) -> type[PrometheusStatLogger]:
    """vLLM's own metrics, without the steps of a measurement, which no client asked for."""

    class ServedMetrics(PrometheusStatLogger):
        def record(self, *args: Any, **more: Any) -> None:
            if times.measured is None:
                super().record(*args, **more)

    return ServedMetrics


def tokens_of_steps(steps: int, drafts: int) -> int:
    """Most tokens of a response until so many steps are counted: a step yields at most drafts + 1 tokens, and UNCOUNTED
    steps are not counted."""
    return (steps + UNCOUNTED) * (drafts + 1)


async def _generate(
    llm: Any, plan: Plan, completions: int, tokens: int, to_the_end: bool = False, until: asyncio.Event | None = None
) -> None:
    """Generate so many completions together. Each has so many tokens, unless it may end before (`to_the_end`), or is
    aborted because `until` was set."""
    sampling = _sampling(tokens, plan.temperature, to_the_end)
    names = [f"measure-{uuid.uuid4().hex}" for _ in range(completions)]

    async def one(i: int, name: str) -> None:
        async for _ in llm.generate({"prompt_token_ids": plan.prompts[i % len(plan.prompts)]}, sampling, name):
            pass

    generating = asyncio.gather(*(one(i, name) for i, name in enumerate(names)))
    if until is not None:
        waiting: asyncio.Future[Any] = asyncio.ensure_future(until.wait())
        await asyncio.wait([generating, waiting], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        await llm.abort(names)
        await llm.get_weight_version()  # returns after the step under way, which would slow what comes next
    await generating


def _sampling(tokens: int, temperature: float, to_the_end: bool) -> "SamplingParams":
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=temperature,
        max_tokens=tokens,
        ignore_eos=not to_the_end,
        logprobs=0,
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )

"""Measurement of step costs and acceptance in a running engine, by a plan: calibration's, or the one at start-up."""

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
"""steps of a batch that begins: prompts come in a few steps, and the first decoding step follows none of its kind"""
START_STEPS = 3
"""steps of each batch size and draft length that an engine measures when it starts, twice"""
START_PROMPT = 8
"""tokens of the random prompts that it measures with"""


class Plan(BaseModel):
    """What to measure: every draft length at every batch size."""

    prompts: list[list[int]]
    """token ids; taken in turn"""
    batch_sizes: list[int]
    draft_lengths: list[int] | None
    """None for an engine without a drafter, which is measured as draft length 0"""
    steps: int
    """of each batch size and draft length, at least"""
    warm_up: bool = True
    """the engine's first steps compile and allocate: generate a little before"""
    responses: int = 0
    """completions, ended as the policy ends them, whose acceptance is counted with the longest drafts"""
    response_tokens: int = 256
    """the longest of them"""
    temperature: float = 1.0


async def measure(llm: Any, times: StepTimes, lengths: DraftLengths, plan: Plan) -> Measured:
    """Run the plan on an engine that does nothing else. Its draft lengths are then those of before."""
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
                    times.ask(StepKind(batch, drafts), plan.steps)
                    await _generate(llm, plan, batch, tokens_of_steps(plan.steps, drafts), until=times.enough)
            # What is drafted past the end of a response says nothing of responses.
            times.measured = counted
            if plan.draft_lengths is not None:
                await hold(max(plan.draft_lengths))
            await _generate(llm, plan, plan.responses, plan.response_tokens, to_the_end=True)
        finally:
            times.measured = None
    return Measured(timed.seconds, timed.first, counted.drafted, counted.accepted)


async def measure_at_start(llm: Any, times: StepTimes, lengths: DraftLengths, context_limit: int) -> StepCosts:
    """What a step costs at every draft length, with random prompts: some seconds."""
    draft_tokens, largest = lengths.config.draft_tokens, lengths.batches
    length = max(1, min(START_PROMPT, context_limit - tokens_of_steps(START_STEPS, draft_tokens)))
    draw, vocabulary = random.Random(0), llm.model_config.get_vocab_size()
    plan = Plan(
        prompts=[[draw.randrange(vocabulary) for _ in range(length)] for _ in range(largest)],
        batch_sizes=sorted({*(4**i for i in range(8) if 4**i < largest), largest}),
        draft_lengths=list(range(draft_tokens + 1)),
        steps=START_STEPS,
    )
    # Twice: a machine that is busy for half a second makes all lengths measured meanwhile look slow, for good.
    passes = [
        await measure(llm, times, lengths, plan),
        await measure(llm, times, lengths, plan.model_copy(update={"warm_up": False})),
    ]
    return fastest([measured.costs(plan.batch_sizes, draft_tokens) for measured in passes])


def served_metrics(times: StepTimes) -> type[PrometheusStatLogger]:
    """vLLM's own metrics, of what is asked for: steps that are measured are nobody's."""

    class ServedMetrics(PrometheusStatLogger):
        def record(self, *args: Any, **more: Any) -> None:
            if times.measured is None:
                super().record(*args, **more)

    return ServedMetrics


def tokens_of_steps(steps: int, drafts: int) -> int:
    """The longest that a response may become until so many steps are counted: a step yields drafts + 1 tokens at most,
    and UNCOUNTED steps are not."""
    return (steps + UNCOUNTED) * (drafts + 1)


async def _generate(
    llm: Any, plan: Plan, completions: int, tokens: int, to_the_end: bool = False, until: asyncio.Event | None = None
) -> None:
    """So many completions at a time, of so many tokens unless they may end before, or are aborted when `until` is
    set."""
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
        await llm.get_weight_version()  # answered after the step under way, which slows what comes next, on any engine
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

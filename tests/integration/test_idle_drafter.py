"""A drafter costs nothing at draft length zero, and drafts afterwards as if it had run all the time."""

from itertools import chain

import pytest
from engines import MODELS
from test_lossless import engine

from rollout_service.evaluation.prompts import read_prompts
from rollout_service.vllm_plugin.idle_drafter import CATCH_UP, IdleDrafter

SCHEDULE = [(1, 1, 3), (2, 64, 0)]
LENGTHS = [8, 24, 40, 40, 40, 100]
"""lengths of responses that are generated together: the longest is drafted for when it is alone"""
BLOCK = 32
"""tokens in a block of the KV cache"""


@pytest.fixture(scope="module")
def prompts():
    return read_prompts(str(MODELS / "policy"), MODELS.parent / "prompts.jsonl")[: len(LENGTHS)]


def generated(llm, prompts, lengths):
    """vLLM's completions, all generated together and greedily."""
    from vllm import SamplingParams

    params = [SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True) for length in lengths]
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)


def draft_steps(outputs):
    """The draft steps of each response, as [(drafted, accepted), ...]."""
    metrics = [output.outputs[0].spec_decode_metrics for output in outputs]
    return [list(zip(m.per_step_drafted, m.per_step_accepted, strict=True)) for m in metrics]


@pytest.fixture(scope="module", params=["draft_model", "eagle3", "mtp"])
def idle(request, prompts):
    """An engine whose drafter is idle where nothing is drafted, and the draft steps of before it was."""
    with engine(request.param, draft_lengths=SCHEDULE, max_model_len=256, block_size=BLOCK) as llm:
        awake = draft_steps(generated(llm, prompts, LENGTHS))
        llm.collective_rpc("let_drafter_idle")
        yield llm, awake


def sizes_of_forwards(llm, monkeypatch):
    """The tokens in each forward pass of the drafter, as a list that grows."""
    (model,) = llm.collective_rpc("get_draft_model")
    sizes, stock = [], model.forward  # vLLM's call bypasses torch's hooks

    def forward(*args, **kwargs):
        sizes.append(len(kwargs["positions"]))
        return stock(*args, **kwargs)

    monkeypatch.setattr(model, "forward", forward)
    return sizes


def hand_overs(llm, monkeypatch):
    """Every update of the scheduler's drafts, empty ones too, as a list that grows."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    drafts, stock = [], scheduler.update_draft_token_ids

    def update_draft_token_ids(of_requests):
        drafts.append(of_requests)
        stock(of_requests)

    monkeypatch.setattr(scheduler, "update_draft_token_ids", update_draft_token_ids)
    return drafts


def test_an_idle_drafter_runs_no_forward_and_drafts_afterwards_as_if_it_had_run(idle, prompts, monkeypatch):
    llm, awake = idle
    llm.reset_prefix_cache()
    sizes, handed_over = sizes_of_forwards(llm, monkeypatch), hand_overs(llm, monkeypatch)
    outputs = generated(llm, prompts, LENGTHS)
    assert draft_steps(outputs) == awake
    undrafted = sum(drafted == 0 for drafted, _ in awake[-1])
    assert undrafted >= 40
    assert len(handed_over) <= sum(drafted > 0 for drafted, _ in awake[-1]) + 1  # the last one is not needed
    # One forward pass reads the prompt and the tokens generated without drafts; the others are of drafting steps.
    behind = len(prompts[-1]) + undrafted - 2
    assert behind <= sizes[0] <= behind + 1
    assert max(sizes[1:]) <= 5

    # A request that finds another's tokens in the KV cache gets the same drafts as one that computed them itself.
    longer = [prompts[2] + list(outputs[2].outputs[0].token_ids)]
    (found,) = generated(llm, longer, [30])
    assert found.num_cached_tokens >= BLOCK
    llm.reset_prefix_cache()
    assert draft_steps([found]) == draft_steps(generated(llm, longer, [30]))


def test_holes_that_are_not_filled_would_show_in_what_is_accepted(idle, prompts, monkeypatch):
    llm, awake = idle
    llm.reset_prefix_cache()
    monkeypatch.setattr(IdleDrafter, "_fill", lambda *_: False)
    holed = draft_steps(generated(llm, prompts, LENGTHS))
    accepted = [sum(accepted for _, accepted in chain(*steps)) for steps in (awake, holed)]
    assert accepted[1] < accepted[0]


@pytest.mark.parametrize("idle", ["mtp"], indirect=True)
def test_a_request_that_ends_soon_is_not_brought_up_to_date(idle, prompts, monkeypatch):
    """Reading the tokens that the drafter missed would take longer than its drafts could save."""
    llm, _ = idle
    sizes = sizes_of_forwards(llm, monkeypatch)
    for further, comes_back in (CATCH_UP, False), (CATCH_UP + 1, True):
        llm.reset_prefix_cache()
        # The first step gives only token 31, and is the first that ends with drafts.
        lengths = [30, 30, 31 + further]
        steps = draft_steps(generated(llm, prompts[:3], lengths))
        assert any(drafted for drafted, _ in steps[-1]) == comes_back
        assert bool(sizes) == comes_back


def test_what_is_read_at_once_fits_the_drafter_s_buffers(prompts, monkeypatch):
    """Several requests come back at once, with more missed tokens than one step may have."""
    with engine("mtp", draft_lengths=SCHEDULE, max_model_len=256, max_num_batched_tokens=256) as llm:
        core = llm.llm_engine.engine_core.engine_core
        stock, steps = core.scheduler.schedule, []

        def schedule(*args, **kwargs):
            core.set_draft_lengths([(1, 64, 0 if len(steps) < 60 else 3)])
            steps.append(1)
            return stock(*args, **kwargs)

        monkeypatch.setattr(core.scheduler, "schedule", schedule)
        awake = draft_steps(generated(llm, prompts, [100] * len(prompts)))
        steps.clear()
        llm.reset_prefix_cache()
        llm.collective_rpc("let_drafter_idle")
        sizes = sizes_of_forwards(llm, monkeypatch)
        assert draft_steps(generated(llm, prompts, [100] * len(prompts))) == awake
        assert sizes[0] == 256
        assert sizes[1] > 24

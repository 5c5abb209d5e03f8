"""The prediction of the seconds that streams take, which draft, drift apart, and end at different times."""

import numpy as np
import pytest

from drafters.schedule import StepCosts, tokens_per_step
from drafters.speed_prediction import GAP, decoding_at, seconds, speedup, steps

# A step takes 20 ms alone and 44 ms at 16 streams, plus what each draft adds; prompts take 20 ms and 44 ms.
STEPS = [[0.020, 0.044], [0.022, 0.090], [0.024, 0.120], [0.026, 0.163]]
COSTS = StepCosts(
    batch_sizes=[1, 16], seconds=STEPS, first=[[s + p for s, p in zip(row, STEPS[0], strict=True)] for row in STEPS]
)
PLAIN = StepCosts(batch_sizes=[1, 16], seconds=[[0.019, 0.040]], first=[[0.038, 0.080]])
ACCEPTANCE = [0.9, 0.8, 0.7]


def sampled_steps(draw, tokens, acceptance=ACCEPTANCE):
    taken = 0
    while tokens > 0:
        taken += 1
        fortune = draw.random()
        tokens -= 1 + sum(fortune < rate for rate in acceptance)
    return taken


def test_without_drafts_each_token_is_a_step_and_all_streams_advance_together():
    alone = seconds(PLAIN, [], [0], streams=1, each=1, tokens=48)
    assert alone == pytest.approx(0.019 + 47 * 0.019)
    assert seconds(PLAIN, [], [0] * 16, streams=16, each=3, tokens=48) == pytest.approx(3 * (0.040 + 47 * 0.040))


def test_the_speed_of_one_stream_is_tokens_over_seconds_and_lower_with_the_prompt():
    long = speedup(COSTS, PLAIN, ACCEPTANCE, [3], streams=1, each=1, tokens=3000)
    assert long == pytest.approx(3.4 * 0.019 / 0.026, rel=2e-3)
    with_prompt = (0.019 + 36 * 0.019) / (0.020 + 9 * 0.026)
    assert speedup(COSTS, PLAIN, [1.0, 1.0, 1.0], [3], streams=1, each=2, tokens=37) == pytest.approx(with_prompt)


@pytest.mark.parametrize(("tokens", "taken"), [(0, 0), (1, 1), (3, 1), (8, 2), (9, 3)])
def test_a_response_ends_in_the_middle_of_a_step(tokens, taken):
    assert steps([1.0, 1.0, 1.0], tokens) == pytest.approx(np.eye(tokens + 1)[taken])


def test_the_number_of_steps_has_the_distribution_of_a_simulation():
    draw = np.random.default_rng(0)
    counted = np.bincount([sampled_steps(draw, 47) for _ in range(20_000)], minlength=48) / 20_000
    predicted = steps(ACCEPTANCE, 47)
    assert predicted.sum() == pytest.approx(1.0)
    assert np.abs(np.cumsum(counted) - np.cumsum(predicted)).max() < 1.63 / 20_000**0.5  # Kolmogorov-Smirnov at 1 %
    mean = predicted @ np.arange(48)
    assert mean > 1.02 * 47 / tokens_per_step(ACCEPTANCE, 3)


def test_a_stream_has_no_part_in_the_steps_between_its_responses():
    two = np.eye(3)[2]  # always two steps
    decoding = decoding_at(two, 2)
    assert list(decoding[: 4 + GAP]) == [1, 1, *[0] * GAP, 1, 1]
    assert not decoding[4 + GAP :].any()


def test_streams_that_drift_apart_take_as_long_as_a_simulation():
    """Sixteen streams of two responses are simulated step by step; a step's cost depends on how many decode in it."""
    draw, drafts = np.random.default_rng(0), [3] * 8 + [2] * 8

    def counted():
        busy = []
        for _ in range(16):
            stream = []
            for _ in range(2):
                stream += [1] * sampled_steps(draw, 71, ACCEPTANCE[:2]) + [0] * GAP
            busy.append(stream + [0] * (2 * (71 + GAP) - len(stream)))
        batches = np.sum(busy, axis=0)
        return sum(COSTS.at(b, drafts[b - 1]) for b in batches if b)

    mean = np.mean([counted() for _ in range(400)])
    predicted = seconds(COSTS, ACCEPTANCE, drafts, streams=16, each=2, tokens=72)
    assert predicted == pytest.approx(mean + 2 * COSTS.prompts(16), rel=0.003)
    full = 2 * (COSTS.prompts(16) + steps(ACCEPTANCE[:2], 71) @ np.arange(72) * COSTS.at(16, 2))
    assert predicted > 1.02 * full

"""The study's report agrees with its figures, and says where they differ from the large run's."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "deploy" / "demo" / "study"))

from config import StudyConfig
from kept import kept
from study_report import write_report

STUDY = Path(__file__).parents[2] / "deploy" / "demo" / "study"


def measured(length, speed=100.0):
    return {"acceptance_length": length, "acceptance_length_ci": None, "acceptance_by_position": [0.5, 0.25],
            "tokens": 10, "seconds": 0.1, "tokens_per_second": speed}  # fmt: skip


def arm(name, lengths):
    return {"arm": name, "acceptance_length": lengths, "reward": [0.1] * len(lengths), "rollout_seconds": 3.0,
            "drafter_version": list(range(len(lengths))), "drafter_age": [0] * len(lengths), "trained_steps": 2,
            "policy_kl": [0.0] * len(lengths), "tokens": 9, "drafter_training_seconds": 1.0,
            "verifications_per_token": 0.4, "z": 0.3}  # fmt: skip


@pytest.fixture
def written(tmp_path):
    def write(speedups, own, other):
        lengths = [
            {"drafter": "mtp", "draft_tokens": k, "speedup": speed} | measured(1 + k / 2)
            for k, speed in enumerate(speedups)
        ]
        starts = [
            {"drafter": "eagle3", "trained_on": source} | measured(length)
            for source, length in (("own rollouts", own), ("other text", other), ("as given", 2.5))
        ]
        arms = [arm("frozen", [3.0, 3.0, 3.0, 2.0, 2.4]), arm("online", [3.0, 3.0, 3.0, 2.97, 3.0])]
        for name, rows in (("lengths", lengths), ("initialisation", starts), ("moving", arms)):
            (tmp_path / f"{name}.json").write_text(json.dumps({"machine": "toy", "versions": {}, "rows": rows}))
        config = StudyConfig(
            model="m", prompts=Path("p"), drafters=[{"kind": "mtp"}], parts=["report"], output=tmp_path
        )
        write_report(config)
        return (tmp_path / "README.md").read_text()

    return write


def test_gains_like_those_of_the_large_run_are_called_similar(written):
    text = written([1.0, 1.2, 1.5, 1.3], own=3.0, other=2.0)
    assert "mtp: fastest with 2 draft tokens (1.50x); longest acceptance with 3" in text
    assert "As in the large run, the best drafter is faster than none" in text
    assert "As there, the longest draft is not the fastest" in text
    assert "As in the large run (3.32 against 2.88), own rollouts help." in text
    assert "shares of the given drafters' acceptance length: eagle3 120.0%." in text


def test_parts_that_need_problems_ask_for_a_task():
    with pytest.raises(ValueError, match=r"moving\.train\.task"):
        StudyConfig(model="m", prompts=Path("p"), drafters=[{"kind": "mtp"}], parts=["initialisation"])


def test_different_behaviour_is_reported_plainly(written):
    text = written([1.0, 0.7, 0.8, 0.9], own=2.0, other=2.5)
    assert "Unlike in the large run, no drafter is faster than none" in text
    assert "Unlike there, the longest draft is the fastest" in text
    assert "own rollouts do not help eagle3" in text


def test_an_arm_is_judged_by_its_lowest_step_too(written):
    text = written([1.0, 1.1], own=3.0, other=2.0)
    assert "frozen: 3.00 at the start, 2.00 at the lowest (-33.3%, step 4)" in text
    assert "online: 3.00 at the start, 2.97 at the lowest (-1.0%, step 4)" in text
    assert "online training does not pay: rollouts took 0 s more than with the frozen drafter" in text


def test_what_was_measured_is_not_measured_again(tmp_path):
    assert kept(tmp_path / "a" / "row.json", lambda: {"x": 1}) == {"x": 1}
    assert kept(tmp_path / "a" / "row.json", lambda: 1 / 0) == {"x": 1}


def test_the_shipped_study_is_a_valid_configuration():
    import tomllib

    from rl_loop.config import TrainConfig

    fields = tomllib.loads((STUDY / "study.toml").read_text())
    config = StudyConfig.model_validate(fields)
    rules = {}
    for arm, training in config.moving.arms.items():
        drafter = {"kind": config.moving.kind, "model": "m", "training": training}
        train = TrainConfig.model_validate(config.moving.train | {"model": config.model, "online_drafter": drafter})
        rules[arm] = train.online_drafter.training.when
    assert rules == {"frozen": "never", "online": "every", "adaptive": "adaptive"}
    assert {drafter.kind for drafter in config.drafters} == {"ngram", "draft_model", "eagle3", "mtp"}
    assert set(config.initialisation.kinds) == {"draft_model", "eagle3", "mtp"}

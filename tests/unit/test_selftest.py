"""The self-test's verdicts: what is right passes, each wrong sampler, verifier or push fails, and the table says it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from test_audit import Bigrams, groups
from test_law import WRONG, Right

from drafters.registry import DrafterConfig
from drafters.settings import read_command_line
from rollout_service.engine.step_costs import Measured, StepKind
from rollout_service.evaluation import selftest as command
from rollout_service.evaluation.audit_config import Setting
from rollout_service.evaluation.audit_row import Level, judge
from rollout_service.evaluation.cut import Cut
from rollout_service.evaluation.noisy_copy import noisy_copy
from rollout_service.evaluation.selftest_checks import (
    Check,
    law_check,
    lengths_check,
    new_drafter_check,
    new_policy_check,
    samples_check,
)
from rollout_service.evaluation.selftest_config import TOLERANCES, SelftestConfig
from rollout_service.evaluation.selftest_engine import check_engine, named
from rollout_service.vllm_plugin.law import deviations

LIMIT = 4.0


def test_right_functions_keep_their_laws():
    check = law_check("mtp", deviations(Right(), scale=4))
    assert check.passed, check.figures
    assert check.figures.startswith("9 laws; largest deviation ")


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_a_wrong_sampler_or_verification_fails_and_is_named(wrong):
    check = law_check("mtp", deviations(wrong(), scale=4))
    assert not check.passed
    assert WRONG[wrong] in check.figures
    assert check.limits == "< 5 standard deviations"


def row(drawn, dtype="float32"):
    setting = Setting(DrafterConfig(kind="mtp"), Cut())
    return judge(setting, drawn, Bigrams(), Level(LIMIT, TOLERANCES[dtype].largest), 1000)


def samples(drawn, dtype="float32"):
    return samples_check("mtp", "temperature 1", row(drawn, dtype), TOLERANCES[dtype], LIMIT)


def test_samples_of_the_policy_pass():
    torch.manual_seed(0)
    assert samples(groups(Bigrams(), 2000)).passed


def test_samples_of_another_temperature_fail_by_surprisal():
    torch.manual_seed(0)
    check = samples(groups(Bigrams(), 2000, drawn_at=1.1))
    assert not check.passed
    assert "surprisal" in check.figures


@pytest.mark.parametrize(("dtype", "right", "wrong"), [("float32", 1e-5, 3e-3), ("bfloat16", 1e-2, 4e-2)])
def test_log_probabilities_are_as_near_as_the_dtype_allows(dtype, right, wrong):
    for off, passes in ((right, True), (wrong, False)):
        torch.manual_seed(0)
        drawn = groups(Bigrams(), 500)
        for group in drawn:
            group.completions[0].logprobs = [logprob + off for logprob in group.completions[0].logprobs]
        check = samples(drawn, dtype)
        assert check.passed == passes
        assert ("wrong: log-probabilities" in check.figures) == (not passes)


def test_log_probabilities_that_are_no_numbers_fail_in_every_dtype():
    torch.manual_seed(0)
    drawn = groups(Bigrams(), 500)
    drawn[7].completions[0].logprobs[0] = float("nan")
    assert not any(samples(drawn, dtype).passed for dtype in TOLERANCES)


def test_every_draft_length_must_have_been_drafted():
    measured = Measured()
    for k in range(4):
        measured.seconds[StepKind(8, k)] += [0.01, 0.011, 0.012]
    assert lengths_check("mtp", measured, 8, 3).passed
    assert "0: 11.0, 1: 11.0" in lengths_check("mtp", measured, 8, 3).figures
    del measured.seconds[StepKind(8, 2)]  # as where a runner ignores the schedule
    check = lengths_check("mtp", measured, 8, 3)
    assert not check.passed
    assert "2: never" in check.figures


GOOD = Check(drafter="mtp", check="", figures="z +0.10", limits="|z| < 4", passed=True)
BAD = GOOD.model_copy(update={"figures": "z +9.00", "passed": False})


@pytest.mark.parametrize(
    ("before", "noise", "after", "of_the_policy", "passes"),
    [
        (2.5, 0.3, 2.4, GOOD, True),
        (2.5, 2.5, 2.5, GOOD, False),  # pushes change nothing
        (2.5, 0.3, 0.3, GOOD, False),  # the second push changes nothing
        (2.5, 0.3, 2.4, BAD, False),  # the drafter changes what is sampled
        (0.1, 0.1, 0.1, GOOD, True),  # too little is accepted to tell
    ],
)
def test_a_new_drafter_must_show_in_acceptance_and_not_in_samples(before, noise, after, of_the_policy, passes):
    check = new_drafter_check("mtp", before, noise, after, of_the_policy)
    assert check.passed == passes
    assert ("too few accepted to tell" in check.limits) == (before < 0.2)


def test_samples_after_a_push_must_be_those_of_the_new_policy():
    assert new_policy_check("none", GOOD, to_new=1e-6, to_old=0.1).passed
    assert not new_policy_check("none", BAD, to_new=1e-6, to_old=0.1).passed
    assert not new_policy_check("none", GOOD, to_new=0.02, to_old=0.02).passed, "both policies fit: nothing was shown"


ABOUT = {"rollout_service": "0.1.0", "device": "NVIDIA H100", "torch": "2.11.0", "replaced": [], "seconds": 93}


def test_the_table_has_versions_figures_limits_and_verdicts():
    console = Console(width=150, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(command.table([GOOD, BAD], ABOUT))
    text = console.export_text()
    for part in ("device: NVIDIA H100", "torch: 2.11.0", "replaced: nothing", "seconds: 93", "z +0.10", "|z| < 4"):
        assert part in text
    assert [line.split()[-1] for line in text.splitlines() if "z +" in line] == ["pass", "FAIL"]


def test_the_command_exits_with_1_when_a_check_fails_and_writes_its_report_first(tmp_path, monkeypatch, capsys):
    found = []

    async def check_all(config, console):
        return found

    monkeypatch.setattr(command, "check_all", check_all)
    config = SelftestConfig(engine={"device": "cpu"}, output=tmp_path / "below" / "selftest.json")
    found += [GOOD]
    assert command.selftest(config) == [GOOD]
    assert "All 1 checks pass." in capsys.readouterr().out
    found += [BAD]
    with pytest.raises(SystemExit) as stop:
        command.selftest(config)
    assert stop.value.code == 1
    assert "1 of 2 checks fail" in capsys.readouterr().out
    report = json.loads(config.output.read_text())
    assert [check["passed"] for check in report["checks"]] == [True, False]
    assert report["device"] == "cpu"
    assert report["vllm"]


class Toy:
    """An engine of a self-test, one of whose checks ends with an error."""

    def __init__(self, starts):
        self.drafter, self.starts, self.stopped = DrafterConfig(kind="mtp"), starts, False
        self.arm = SimpleNamespace(fleet=self, stop=self.stop)

    async def running(self):
        return {"draft_sampling": "probabilistic", "verification": "standard (vLLM)"}

    async def start(self):
        if not self.starts:
            raise RuntimeError("the GPU has no memory left")

    async def stop(self):
        self.stopped = True

    async def raises(self):
        raise AttributeError("'V2' has no attribute 'drafter'")

    async def passes(self):
        return GOOD

    def checks(self):
        return iter([("draft lengths", self.raises), ("new policy", self.passes)])


async def test_an_error_is_a_failed_check_and_the_next_checks_still_run():
    engine = Toy(starts=True)
    start, failed, passed = await check_engine(engine, Progress(disable=True))
    assert (start.passed, failed.passed, passed.passed) == (True, False, True)
    assert start.figures.endswith("drafts probabilistic, verification standard (vLLM)")
    assert failed.check == "draft lengths"
    assert failed.figures == "AttributeError: 'V2' has no attribute 'drafter'"
    assert engine.stopped


async def test_an_engine_that_does_not_start_is_a_failed_check():
    engine = Toy(starts=False)
    (start,) = await check_engine(engine, Progress(disable=True))
    assert (start.check, start.passed, engine.stopped) == ("start", False, True)
    assert start.figures == "RuntimeError: the GPU has no memory left"


def kinds(config):
    return [(drafter.kind, drafter.model) for drafter in config.checked()]


def test_the_demo_is_checked_with_its_mtp_head_and_on_request_with_its_other_drafters():
    assert kinds(SelftestConfig()) == [("none", None), ("mtp", None)]
    assert kinds(SelftestConfig(drafters=["eagle3", "ngram"])) == [
        ("eagle3", "deploy/demo/models/eagle3"),
        ("ngram", None),
    ]


def test_a_service_is_checked_with_its_own_drafter_and_nothing_of_its_front(tmp_path):
    file = tmp_path / "service.toml"
    file.write_text(
        f'model = "m"\nengines = 3\nstate = "{tmp_path / "state"}"\nport = 80\nray_address = "auto"\n'
        '[engine]\ndtype = "bfloat16"\nmax_model_len = 16384\n'
        '[drafter]\nkind = "eagle3"\nmodel = "head"\ndraft_tokens = 5\nverification = "block"\n'
    )
    config = read_command_line(SelftestConfig, "rollout-service selftest", ["--config", str(file)])
    assert kinds(config) == [("none", None), ("eagle3", "head")]
    drafter = config.checked()[1]
    service = config.service(drafter)
    assert (service.engines, service.state, service.ray_address) == (1, None, None)
    assert (service.engine.dtype, service.engine.max_model_len) == ("bfloat16", 192)
    assert (drafter.verification, drafter.schedule) == ("block", [(1, 64, 5)])
    assert [cut.temperature for cut in config.cuts()] == [1.0, 0.7], "in 16 bits the most likely token may differ"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"drafters": ["mpt"]}, "drafters\n.*unknown kind 'mpt'; the kinds are none, ngram"),
        ({"model": "m", "drafters": ["eagle3"]}, "drafter.model: kind 'eagle3' needs the folder"),
        ({"tokens": 10}, "tokens"),
        ({"engine": {"max_model_len": 128}}, "engine.max_model_len: a self-test needs 192 tokens"),
    ],
)
def test_a_wrong_field_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        SelftestConfig(**fields)


def test_a_flag_of_the_demos_engine_leaves_its_other_fields():
    flags = read_command_line(SelftestConfig, "selftest", ["--engine.tensor_parallel_size", "2"])
    assert (flags.engine.dtype, flags.engine.max_num_seqs) == ("float32", 32)
    own = read_command_line(SelftestConfig, "selftest", ["--model", "m", "--engine.cores", "1"])
    assert own.engine.dtype == "bfloat16"


def test_outside_of_the_checkout_the_demo_is_not_there_and_a_model_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="model: there is no deploy/demo/models/policy here"):
        SelftestConfig()


def test_a_check_is_named_by_its_cut():
    assert [named(cut) for cut in SelftestConfig().cuts()] == [
        "temperature 1",
        "temperature 0.7, top-p 0.9, top-k 20",
        "temperature 0",
    ]


def test_a_noisy_copy_changes_the_matrices_that_belong_and_nothing_else(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "policy"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    before = {"a.weight": torch.randn(8, 8), "a.bias": torch.randn(8), "mtp.weight": torch.randn(8, 8)}
    save_file(before, folder / "model.safetensors")
    copy = noisy_copy(folder, tmp_path / "copy", lambda name: name.startswith("a"), 0.05)
    after = load_file(copy / "model.safetensors")
    assert (copy / "config.json").read_text() == "{}"
    assert torch.equal(after["a.bias"], before["a.bias"])
    assert torch.equal(after["mtp.weight"], before["mtp.weight"])
    noise = (after["a.weight"] - before["a.weight"]).std() / before["a.weight"].std()
    assert 0.03 < noise < 0.07


@pytest.mark.parametrize("policy", ["policy", "latent/policy"])
def test_acceptance_of_the_demos_policies_is_measured_on_the_demos_prompts(policy):
    """On random tokens hardly any draft of theirs is accepted, so that a drafter that is noise accepts as many."""
    config = SelftestConfig(model=f"deploy/demo/models/{policy}")
    assert config.acceptance_prompts() == Path("deploy/demo/prompts.jsonl")

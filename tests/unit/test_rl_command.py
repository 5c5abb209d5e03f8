"""`rl-loop train` as a command, against a toy service behind the real client's HTTP."""

import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import httpx
import pytest
import rl_toys as toys
from safetensors.torch import load

import rollout_service.client.rollout_client
from drafters.files.text_lines import json_lines
from rl_loop.cli import train
from rl_loop.learner.local_learner import LocalLearner
from rl_loop.loops.interruption import Interrupted, Interruption
from rl_loop.run.checkpoint import checkpoints
from rollout_service.protocol import (
    ErrorBody,
    RolloutRequest,
    SpeculationAlarm,
    SpeculationStatus,
    WeightsStatus,
    WeightStatus,
)

MAX_MODEL_LEN = 64


class MiniatureService:
    """The routes that a trainer uses, served by httpx.MockTransport."""

    def __init__(self):
        self.source = toys.SamplingSource(toys.llama())
        self.rollouts_refused: ErrorBody | None = None
        self.on_rollouts = lambda: None
        self.owner: str | None = None

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.headers.get("Authorization") != "Bearer secret":
            return httpx.Response(401, content=ErrorBody(error="token needed").model_dump_json())
        return getattr(self, f"_{request.url.path.rsplit('/', 1)[-1]}")(request)

    def _models(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"data": [{"id": "toy", "max_model_len": MAX_MODEL_LEN}]})

    def _speculation(self, request: httpx.Request) -> httpx.Response:
        alarm = SpeculationAlarm(
            kind="acceptance_fell", of="policy", policy_version=2, drafter_version=1, message="the acceptance rate fell"
        )
        return httpx.Response(200, content=SpeculationStatus(drafters=[], alarms=[alarm]).model_dump_json())

    def _ready(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(200)

    def _weights(self, request: httpx.Request) -> httpx.Response:
        if request.method == "DELETE":
            self.owner = None if self.owner == request.url.params["run"] else self.owner
            return httpx.Response(200, json={"released": 1})
        status = WeightsStatus(policy=self._status(), drafter=None, dtype="float32", shared_memory="/no/such")
        return httpx.Response(200, content=status.model_dump_json())

    def _policy(self, request: httpx.Request) -> httpx.Response:
        version, run = int(request.url.params["version"]), request.url.params["run"]
        if self.owner not in (None, run) and "take_over" not in request.url.params:
            return httpx.Response(409, content=ErrorBody(error=f"belongs to {self.owner!r}").model_dump_json())
        assert version > self.source.version
        self.owner = run
        self.source.publish("policy", lambda dtype: load(request.read()), version - 1)
        return httpx.Response(200, content=self._status().model_dump_json())

    def _status(self) -> WeightStatus:
        return WeightStatus(version=self.source.version, tensors=1, bytes=1, checksum="", run=self.owner)

    def _rollouts(self, request: httpx.Request) -> httpx.Response:
        self.on_rollouts()
        if self.rollouts_refused is not None:
            return httpx.Response(400, content=self.rollouts_refused.model_dump_json())
        groups = RolloutRequest.model_validate_json(request.read()).groups
        lines = [group.model_dump_json() for group in self.source.rollouts("", groups)]
        return httpx.Response(200, content="\n".join(lines))


@pytest.fixture
def service(monkeypatch) -> MiniatureService:
    service = MiniatureService()
    client = httpx.Client
    through = lambda **options: client(**(options | {"transport": httpx.MockTransport(service)}))  # noqa: E731
    monkeypatch.setattr(rollout_service.client.rollout_client.httpx, "Client", through)
    return service


@pytest.fixture
def flags(tmp_path) -> list[str]:
    model = tmp_path / "model"
    toys.llama().save_pretrained(model)
    toys.character_tokenizer().save_pretrained(model)
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1)}) + "\n" for i in range(10)))
    toml = tmp_path / "train.toml"
    toml.write_text(
        f"""
        model = "{model}"
        output = "{tmp_path / "run"}"
        token = "secret"
        steps = 2
        prompts_per_step = 2
        completions = 2
        evaluate_every = 2
        evaluation_prompts = 2
        ready_timeout = 0
        task = {{ kind = "jsonl", path = "{data}" }}
        sampling = {{ max_tokens = 8 }}
        """
    )
    return ["--config", str(toml)]


def test_a_run_leaves_metrics_summary_plot_and_checkpoint(service, flags, tmp_path, capsys):
    assert train([*flags, "--tensorboard", "--record_rollouts"]) == 0
    output = tmp_path / "run"
    summary = json.loads((output / "summary.json").read_text())
    assert summary["steps"] == 2
    assert set(summary["held_out"]) == {"reward_before", "reward_after", "pass_rate_before", "pass_rate_after"}
    costs = summary["costs"]
    parameters = sum(tensor.numel() for tensor in toys.llama().parameters())
    assert [(m["model"], m["active_parameters"]) for m in costs["models"]] == [("policy", parameters)]
    assert [(step["drafter"], step["streams"]) for step in costs["steps"]] == [("none", 1), ("none", 4)]
    assert costs["dtype"] == "float32", "as the service says"
    responses = [line["response_length"] for line in json_lines(output / "metrics.jsonl")]
    assert costs["context"] == pytest.approx(len("0+1=") + 1 + sum(responses) / len(responses) / 2)
    for line in json_lines(output / "drafter.jsonl"):
        assert (line["drafter_version"], line["acceptance_length"], line["updates"]) == (0, 2.5, 0)
    assert (output / "acceptance.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert [folder.name for folder in checkpoints(output)] == ["step-000000", "step-000002"]
    assert list((output / "tensorboard").iterdir())
    names = ("train-000001", "train-000002", "held_out-000000", "held_out-000002")
    assert {f.name for f in (output / "rollouts").iterdir()} == {"recording.json", *(f"{name}.jsonl" for name in names)}
    assert service.source.version == 3
    printed = capsys.readouterr().out
    assert "the service raised alarm acceptance_fell: the acceptance rate fell" in printed
    assert "step 2" in printed
    assert "losslessness" in printed
    assert f"{parameters:,}" in printed
    assert json.loads((output / "config.json").read_text())["token"] == "**********"


def test_a_run_resumes_and_does_not_overwrite_another_one(service, flags, tmp_path, capsys):
    assert train([*flags, "--steps", "1"]) == 0
    assert train(flags) == 1
    assert "--resume" in capsys.readouterr().err
    assert train([*flags, "--resume"]) == 0
    assert [line["step"] for line in json_lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


def test_one_command_starts_or_resumes_a_run(service, flags, tmp_path):
    output, always = tmp_path / "run", [*flags, "--steps", "2", "--resume"]
    assert train([*always, "--steps", "1"]) == 0, "there is no run yet"
    assert train(always) == 0
    assert train(always) == 0, "the run is finished"
    for folder in checkpoints(output):  # as if killed before the first checkpoint
        shutil.rmtree(folder)
    assert train(flags) == 1, "without --resume, the metrics of a run stop it"
    assert train(always) == 0
    assert [line["step"] for line in json_lines(output / "metrics.jsonl")] == [1, 2]


def test_a_run_has_a_checkpoint_before_it_asks_the_service_for_anything(service, flags, tmp_path):
    found = []
    service.on_rollouts = lambda: found.append(checkpoints(tmp_path / "run")[0].name)
    assert train(flags) == 0
    assert found[0] == "step-000000"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_and_a_clear_message(signum, service, flags, tmp_path, capsys):
    asked, before = [], signal.getsignal(signal.SIGINT)
    service.on_rollouts = lambda: asked.append(1) or (len(asked) == 3 and os.kill(os.getpid(), signum))
    assert train(flags) == 128 + signum
    assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["step-000000", "step-000001"]
    ended = capsys.readouterr()
    assert signal.Signals(signum).name in ended.err
    assert "--resume" in ended.out
    assert signal.getsignal(signal.SIGINT) is before


def test_a_service_that_stops_answering_ends_the_run_with_a_checkpoint_and_the_waiting_time(
    service, flags, tmp_path, capsys
):
    def third_hangs(asked=[]):  # noqa: B006  (it counts)
        asked.append(1)
        if len(asked) == 3:
            raise httpx.ReadTimeout("timed out")

    service.on_rollouts = third_hangs
    assert train(flags) == 1
    assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["step-000000", "step-000001"]
    assert "http://127.0.0.1:8000: no answer within 7200 s" in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyError, AssertionError, KeyboardInterrupt, SystemExit])
def test_whatever_ends_a_run_leaves_a_checkpoint(error, service, flags, tmp_path, capsys):
    asked = []

    def third_fails():
        asked.append(1)
        if len(asked) == 3:
            raise error("no words for it")

    service.on_rollouts = third_fails
    with pytest.raises(error):
        train(flags)
    assert checkpoints(tmp_path / "run")[-1].name == "step-000001"
    assert "state after step 1 is in" in capsys.readouterr().out
    service.on_rollouts = lambda: None
    assert train([*flags, "--resume"]) == 0


def test_a_checkpoint_that_cannot_be_written_does_not_hide_what_ended_the_run(service, flags, capsys, monkeypatch):
    def refused(*_):
        raise ValueError("no such layout")

    def third_fails(asked=[]):  # noqa: B006  (it counts)
        asked.append(1)
        if len(asked) == 3:
            monkeypatch.setattr("rl_loop.loops.loop.save_checkpoint", refused)
            raise ZeroDivisionError

    service.on_rollouts = third_fails
    with pytest.raises(ZeroDivisionError):
        train(flags)
    assert "the checkpoint of step 1 was not written: no such layout" in capsys.readouterr().out


def test_the_checkpoint_message_mentions_a_step_that_failed_between_two_updates(
    service, flags, tmp_path, capsys, monkeypatch
):
    update, made = LocalLearner.forward_backward, []

    def second_fails(self, examples):
        made.append(1)
        if len(made) == 2:
            raise MemoryError
        return update(self, examples)

    monkeypatch.setattr(LocalLearner, "forward_backward", second_fails)
    with pytest.raises(MemoryError):
        train([*flags, "--minibatches", "2"])
    assert "state after step 0, with some updates of step 1, is in" in capsys.readouterr().out


DEFAULTS = {"temperature": 0.6, "top_p": 0.95}
"""sampling defaults that transformers refuses to save without `do_sample`"""


def test_sampling_defaults_that_transformers_would_refuse_are_copied_unchanged(service, flags, tmp_path):
    file = tmp_path / "model" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | DEFAULTS))
    assert train([*flags, "--steps", "1"]) == 0
    assert train([*flags, "--resume"]) == 0
    for folder in checkpoints(tmp_path / "run"):
        assert (folder / "generation_config.json").read_bytes() == file.read_bytes()


def test_a_policy_whose_sampling_defaults_are_in_its_configuration_is_saved(service, flags, tmp_path):
    (tmp_path / "model" / "generation_config.json").unlink()
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | DEFAULTS))
    assert train(flags) == 0
    assert not (checkpoints(tmp_path / "run")[-1] / "generation_config.json").exists()


@pytest.mark.parametrize("what", ["checkpoint", "metrics"])
def test_a_full_disk_ends_a_run_in_one_line_that_says_where(what, service, flags, tmp_path, capsys, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")

    def no_room(*_, **__):
        raise full

    if what == "checkpoint":
        monkeypatch.setattr("rl_loop.run.checkpoint.save_file", no_room)
    else:
        monkeypatch.setattr("rl_loop.reports.metrics_log._append", no_room)
    assert train(flags) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(tmp_path / "run") in said
    monkeypatch.undo()


def test_a_refusal_of_the_service_is_passed_on(service, flags, tmp_path, capsys):
    problem = {"field": "groups.0.sampling.top_p", "message": "cannot be lossless"}
    service.rollouts_refused = ErrorBody.model_validate({"error": "bad request", "problems": [problem]})
    assert train(flags) == 1
    message = capsys.readouterr().err
    assert "groups.0.sampling.top_p: cannot be lossless" in message
    assert checkpoints(tmp_path / "run")


@pytest.mark.parametrize(
    ("more", "code", "named"),
    [
        (["--token", "wrong"], 1, "401"),
        (["--sampling.max_tokens", "62"], 1, "sampling.max_tokens"),
        (["--model", "/no/such/model"], 1, "model"),
        (["--task.reward", "nowhere:f"], 2, "task.reward"),
    ],
)
def test_what_cannot_work_is_reported_before_work_starts(more, code, named, service, flags, tmp_path, capsys):
    assert train([*flags, *more]) == code
    assert named in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("processes", [0, 1])
def test_rewards_that_all_fail_leave_a_checkpoint_and_say_why(processes, service, flags, tmp_path, monkeypatch, capsys):
    (tmp_path / "failing_rewards.py").write_text("def fail(response, entry):\n    raise LookupError('no such table')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # the file changes within a timestamp's resolution
    monkeypatch.delitem(sys.modules, "failing_rewards", raising=False)
    more = ["--task.reward", "failing_rewards:fail", "--reward_processes", str(processes), "--evaluate_every", "0"]
    assert train([*flags, *more]) == 1
    assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["step-000000"]
    said = capsys.readouterr().err
    assert "rl-loop train: the last 16 groups had fewer than two rewards left, since rewards failed" in said
    assert "LookupError: no such table. Correct the reward, and continue with --resume" in said
    (tmp_path / "failing_rewards.py").write_text("def fail(response, entry):\n    return len(response)\n")
    monkeypatch.delitem(sys.modules, "failing_rewards")
    assert train([*flags, *more, "--resume"]) == 0


def with_overlong(tmp_path, folder="prompts.jsonl", places=(4,), count=10):
    """The problems of `flags`. At `places`, prompts leave no room for a response of 8 tokens in a context of 64."""
    prompts = [("1+" * 40 if place in places else f"{place}+1=", place + 1) for place in range(count)]
    lines = [json.dumps({"prompt": prompt, "answer": str(answer)}) + "\n" for prompt, answer in prompts]
    (tmp_path / folder).write_text("".join(lines))


def test_one_overlong_prompt_anywhere_in_the_file_is_refused_before_work_starts(service, flags, tmp_path, capsys):
    for place in (0, 4, 9):  # the last problem is held out
        with_overlong(tmp_path, places=(place,))
        assert train(flags) == 1
        [line] = capsys.readouterr().err.splitlines()
        assert line == (
            f"rl-loop train: task.overlong: 1 of 10 prompts are too long: {tmp_path / 'prompts.jsonl'}, "
            f"line {place + 1} (81 tokens). The served policy's max_model_len is 64, and sampling.max_tokens is 8, so "
            "a prompt may have 56 tokens; shorten the prompts, or leave them out with --task.overlong skip"
        )
        assert not (tmp_path / "run").exists()


def test_held_out_prompts_are_not_measured_without_evaluation(service, flags, tmp_path):
    with_overlong(tmp_path, places=(9,))
    assert train([*flags, "--evaluate_every", "0"]) == 0


def test_a_file_of_only_overlong_prompts_is_refused_even_if_they_may_be_skipped(service, flags, tmp_path, capsys):
    with_overlong(tmp_path, places=range(10))
    assert train([*flags, "--task.overlong", "skip"]) == 1
    said = capsys.readouterr().err
    assert "10 of 10 prompts are too long" in said
    assert "line 5 (81 tokens)" in said or " and 5 more" in said


def test_overlong_prompts_are_skipped_and_counted(service, flags, tmp_path, capsys):
    with_overlong(tmp_path, places=(1, 4, 8))
    assert train([*flags, "--task.overlong", "skip", "--steps", "9", "--record_rollouts"]) == 0  # three epochs
    printed = capsys.readouterr().out
    assert "task.overlong: the run skips 3 of 9 prompts of train and 0 of 1 prompts of held_out: " in printed
    assert "line 9 (81 tokens)" in printed
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["prompts_skipped"] == 3
    replayed = ["--replay", str(tmp_path / "run" / "rollouts"), "--output", str(tmp_path / "replayed"), "--steps", "9"]
    assert train([*flags, *replayed, "--task.overlong", "skip"]) == 0, (
        "a replay asks for the prompts that were recorded"
    )
    assert train([*flags, "--task.overlong", "skip", "--steps", "12", "--resume"]) == 0


NO_SYSTEM = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" \
    "{{ m.content }}{% endfor %}"  # fmt: skip


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (NO_SYSTEM, "no system role (the roles of its messages are system, user; see task.chat"),
        (None, "messages need a chat template, and the policy's tokenizer has none; give the prompt as text"),
    ],
)
def test_a_chat_that_the_policys_template_refuses_is_reported_before_work_starts(
    template, said, service, flags, tmp_path, capsys
):
    tokenizer = toys.character_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "model")
    assert train([*flags, "--task.chat", "--task.system_prompt", "1"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"rl-loop train: task: {tmp_path / 'prompts.jsonl'}, line ")
    assert said in line
    assert not (tmp_path / "run").exists()


def test_a_missing_endpoint_is_reported(flags, capsys):
    assert train([*flags, "--endpoint", "http://127.0.0.1:9"]) == 1
    message = capsys.readouterr().err
    assert "http://127.0.0.1:9" in message
    assert "rollout-service launch" in message


def test_a_run_that_ends_lets_the_next_one_use_the_service(service, flags, tmp_path):
    assert train(flags) == 0
    assert service.owner is None
    assert train([*flags, "--output", str(tmp_path / "second")]) == 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_a_signal_ends_releases_the_service(signum, service, flags):
    owners = []
    service.on_rollouts = lambda: owners.append(service.owner) or (len(owners) == 3 and os.kill(os.getpid(), signum))
    assert train(flags) == 128 + signum
    assert owners[0].startswith("run-")
    assert service.owner is None


def test_a_run_refuses_a_service_of_another_run_unless_it_takes_over(service, flags, tmp_path, capsys):
    service.owner = "another-1"
    assert train(flags) == 1
    message = capsys.readouterr().err
    assert "the run 'another-1'" in message
    assert "--take_over" in message
    assert not (tmp_path / "run").exists(), "another try is possible"
    assert (service.source.version, service.owner) == (0, "another-1")
    assert train([*flags, "--take_over"]) == 0


def test_a_run_that_is_taken_over_ends_with_a_checkpoint_and_can_be_resumed(service, flags, tmp_path, capsys):
    asked = []

    def third_meets_another():
        asked.append(1)
        if len(asked) == 3:
            service.owner, service.source.version = "another-1", service.source.version + 1

    service.on_rollouts = third_meets_another
    assert train(flags) == 1
    message = capsys.readouterr().err
    for named in ("version 3 ", "version 2.", "'another-1'", "'run-"):
        assert named in message
    assert [folder.name for folder in checkpoints(tmp_path / "run")][-1] == "step-000001"
    assert service.owner == "another-1"
    assert train([*flags, "--resume"]) == 1
    assert train([*flags, "--resume", "--take_over"]) == 0


def test_a_killed_run_resumes_under_its_name(service, flags, tmp_path):
    owners = []
    service.on_rollouts = lambda: owners.append(service.owner)
    assert train([*flags, "--steps", "1"]) == 0
    service.owner = owners[0]  # the state that a run leaves when it is killed after this step
    assert train([*flags, "--resume"]) == 0
    assert set(owners) == {owners[0]}


def test_a_deferred_signal_comes_after_the_section():
    done = []

    def section(interruption):
        with interruption.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append(True)

    with Interruption() as interruption, pytest.raises(Interrupted):
        section(interruption)
    assert done, "the section was completed"


def test_the_package_needs_neither_vllm_nor_ray():
    sources = Path(__file__).parents[2].joinpath("rl_loop").rglob("*.py")
    assert not [f for f in sources if "import vllm" in f.read_text() or "import ray" in f.read_text()]

"""A training run with faults at random moments: no group is lost or trained on twice, and versions only grow.

    make test-faults                                      100 faults
    pytest tests/integration/faults --faults 20 --faults-within 600 --faults-seed 7 -s

The groups are counted from two independent logs: the queue's (a table of its database) and the trainer's
(groups.jsonl).
"""

import random
import shutil
import signal
import time
from collections import Counter

import torch
from bad_requests import RUN, BadRequests
from engines import MODELS
from faults import Faults, Versions, read_lines
from over_http import PROMPT
from safetensors.torch import load_file, save_file
from service import Service, Trainer
from transformers import AutoModelForCausalLM

from drafters.scoring import SurprisalSums, join_scores, score_tokens
from rollout_service.client import RolloutClient
from rollout_service.protocol import GroupRequest, Sampling
from rollout_service.queue.batch_queue import BatchQueue

QUOTA_MIB = 8
"""with this, the log keeps 16,384 lines, and 100 faults write about 11,000"""
SMALL_RUN = (
    "--prompts_per_step", "4", "--completions", "4", "--sampling.max_tokens", "96", "--learning_rate", "3e-5",
    "--steps", "100000", "--threads", "1", "--evaluate_every", "0", "--checkpoint_every", "2",
    "--lease_seconds", "20", "--ready_timeout", "300",
)  # fmt: skip


def test_a_run_survives_random_faults_with_nothing_lost_and_nothing_twice(tmp_path, request):
    number, within = request.config.getoption("--faults"), request.config.getoption("--faults-within")
    seed = request.config.getoption("--faults-seed")
    print(f"\n{number} faults, seed {seed}, in {tmp_path}")
    # Draft lengths are fixed, so that an engine that restarts need not measure first.
    small = ("--queue.disk_mib", str(QUOTA_MIB), "--engine.cores", "1", "--drafter.schedule", "fixed")
    service = Service(tmp_path, *small)
    service.start()
    trainer = Trainer(tmp_path, service.url, *SMALL_RUN)
    faults, bad, versions = (
        Faults(service, trainer, seed),
        BadRequests(service.url, seed, pause=0.2, may_be_down=True),
        Versions(service.url),
    )
    try:
        trainer.start()
        bad.start()
        versions.start()
        ends = time.monotonic() + within
        for i, kind in enumerate(schedule(number, seed)):
            if time.monotonic() > ends:
                break
            while trainer.steps() < 1:  # a fault before the first groups would show nothing
                assert trainer.is_alive, trainer.log.read_text()[-3000:]
                time.sleep(0.2)
            began = time.monotonic()
            time.sleep(faults.random.uniform(0.0, 2.0))
            faults.inflict(kind)
            print(f"{i + 1:4d} {kind:8s} {time.monotonic() - began:5.1f} s, {trainer.steps()} steps", flush=True)
        assert faults.done
        print(f"inflicted: {dict(faults.done)}")
        assert trainer.interrupt() == 128 + signal.SIGTERM, trainer.log.read_text()[-3000:]
        bad.stop()
        versions.stop()
        check_losslessness(service)
        assert service.stop(signal.SIGTERM, within=40) == 0
    finally:
        for process in (trainer, service):
            if process.is_alive:
                process.process.kill()
    check_bad_requests(bad)
    check_versions(versions, trainer)
    check_every_group(service, trainer)


def schedule(number: int, seed: int) -> list[str]:
    """Every kind of fault once per round, each round in a new order."""
    generator, kinds = random.Random(seed), ["engine", "front", "trainer", "push", "disk"]
    rounds = [generator.sample(kinds, len(kinds)) for _ in range(-(-number // len(kinds)))]
    return [kind for of_round in rounds for kind in of_round][:number]


def check_every_group(service, trainer):
    trained = Counter(name for line in read_lines(trainer.output / "groups.jsonl") for name in line["groups"])
    spent = Counter(name for line in read_lines(trainer.output / "groups.jsonl") for name in line["spent"])
    queue = BatchQueue(service.state / "queue.sqlite", capacity=10**6, disk_mib=4096)
    log = [line for line in queue.log() if line["run"] not in ("", RUN) and not line["run"].startswith("filler")]
    accepted, acknowledged = (
        Counter(line["id"] for line in log if line["event"] == event) for event in ("accepted", "acknowledged")
    )
    left = {
        name
        for (name,) in queue.database.execute(
            "SELECT id FROM groups WHERE state != 'acknowledged' AND run NOT IN ('', ?)", (RUN,)
        )
    }
    queue.close()
    print(
        f"{len(accepted)} groups accepted, {len(acknowledged)} acknowledged, {len(left)} left, {len(trained)} trained"
    )
    assert len(trained) > 10
    assert max((trained + spent).values()) == 1, "nothing is trained on twice"
    assert max(accepted.values()) == 1
    assert max(acknowledged.values()) == 1
    assert set(acknowledged) <= set(trained) | set(spent), "what is acknowledged was trained on"
    assert set(accepted) == set(acknowledged) | left, "nothing is lost"
    assert not left & set(acknowledged)
    indices = sorted(int(name.removeprefix("train-")) for name in trained + spent)
    # All problems in order were trained on, except those that were on their way when the run ended.
    missing = set(range(indices[-1])) - set(indices)
    assert {f"train-{index:09d}" for index in missing} <= left


def check_versions(versions, trainer):
    assert len(versions.seen) > 10, "somebody looked"
    assert versions.backwards == []
    of_steps = [line["version"] for line in read_lines(trainer.output / "metrics.jsonl")]
    assert of_steps == sorted(of_steps)
    assert [line["step"] for line in read_lines(trainer.output / "metrics.jsonl")] == list(range(1, len(of_steps) + 1))
    for line in read_lines(trainer.output / "metrics.jsonl"):
        assert len(line["staleness"]) <= 2, "nothing is older than one version"


def check_bad_requests(bad):
    print(f"answers to bad requests: {dict(bad.answers)}")
    assert bad.unexpected == []
    assert bad.answers.total() > 20


def check_losslessness(service):
    """After all faults, the engine samples from exactly the weights that the service reports."""
    with RolloutClient(service.url) as client:
        version = client.weights().policy.version
        asked = [GroupRequest(id=f"{i}", prompt=PROMPT, n=8, sampling=Sampling(max_tokens=48)) for i in range(8)]
        groups = list(client.rollouts(asked))
    folder = service.state.parent / "in-service"
    folder.mkdir()
    shutil.copy(MODELS / "policy" / "config.json", folder)
    tensors = load_file(service.state / "weights" / f"policy-{version}.safetensors")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    worst, scores = 0.0, []
    for group in groups:
        for completion in group.completions:
            assert {span.version for span in completion.weight_versions} == {version}
            tokens = torch.tensor(completion.token_ids)
            with torch.no_grad():
                ids = torch.cat([torch.tensor(group.prompt_token_ids), tokens])[None]
                logits = model(ids).logits[0, len(group.prompt_token_ids) - 1 : -1]
            scores.append(score_tokens(logits, tokens))
            worst = max(worst, (scores[-1].sampled_logprobs - torch.tensor(completion.logprobs)).abs().max().item())
    z = SurprisalSums.of(join_scores(scores)).z
    print(f"version {version}: largest log-probability difference {worst:.1e}, z {z:+.2f}")
    assert worst < 1e-4
    assert abs(z) < 4.0

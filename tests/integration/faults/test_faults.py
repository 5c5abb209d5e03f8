"""A training run with faults at random moments: no group is lost or trained on twice, and versions only grow.

make test-faults          100 faults of a service on one machine
make test-node-faults     100 faults of a service on three Ray nodes, with a record
pytest tests/integration/faults --faults 20 --faults-within 600 --faults-seed 7 -s
"""

import platform
import random
import shutil
import signal
import time

import pytest
import torch
from bad_requests import BadRequests
from engines import MODELS
from faults import Faults, NodeFaults, Versions
from nodes import HAS_NETWORKS, nodes
from over_http import PROMPT
from record import Fault, record_of
from safetensors.torch import load_file, save_file
from service import Service, Trainer
from transformers import AutoModelForCausalLM

from drafters.scoring import SurprisalSums, join_scores, score_tokens
from rollout_service.client import RolloutClient
from rollout_service.protocol import GroupRequest, Sampling

QUOTA_MIB = 8
"""with this, the log keeps 16,384 lines, and 100 faults write about 11,000"""
SMALL_RUN = (
    "--prompts_per_step", "4", "--completions", "4", "--sampling.max_tokens", "96", "--learning_rate", "3e-5",
    "--steps", "100000", "--threads", "1", "--evaluate_every", "0", "--checkpoint_every", "2",
    "--lease_seconds", "20", "--ready_timeout", "300",
)  # fmt: skip


SMALL_SERVICE = ("--queue.disk_mib", str(QUOTA_MIB), "--engine.cores", "1", "--drafter.schedule", "fixed")
"""Draft lengths are fixed, so that an engine that restarts need not measure first."""


def test_a_run_survives_random_faults_with_nothing_lost_and_nothing_twice(tmp_path, request):
    service = Service(tmp_path, *SMALL_SERVICE)
    trainer = Trainer(tmp_path, service.url, *SMALL_RUN)
    survives(service, trainer, Faults(service, trainer, request.config.getoption("--faults-seed")), request.config)


@pytest.mark.again
@pytest.mark.skipif(not HAS_NETWORKS, reason="needs root and iproute2, for networks of its own")
def test_a_run_on_several_nodes_survives_random_faults_with_nothing_lost_and_nothing_twice(tmp_path, request):
    """Two engines on two nodes, which die, freeze and are cut off, and the head dies with the front."""
    with nodes(tmp_path, workers=2) as cluster, cluster.supervised():
        on_nodes = ("--ray_address", cluster.address, "--engines", "2", "--engine_timeout", "8")
        service = Service(tmp_path, *SMALL_SERVICE, *on_nodes)
        trainer = Trainer(tmp_path, service.url, *SMALL_RUN)
        faults = NodeFaults(service, trainer, cluster, request.config.getoption("--faults-seed"))
        survives(service, trainer, faults, request.config, nodes=2)


def survives(service, trainer, faults, config, nodes=0):
    """Inflicts as many faults as the command line says, and checks what both sides wrote down."""
    number, within = config.getoption("--faults"), config.getoption("--faults-within")
    seed, kept = config.getoption("--faults-seed"), config.getoption("--faults-record")
    print(f"\n{number} faults, seed {seed}, in {trainer.output.parent}")
    service.start()
    bad = BadRequests(service.url, seed, pause=0.2, may_be_down=True)
    versions, inflicted = Versions(service.url), []
    try:
        trainer.start()
        bad.start()
        versions.start()
        ends = time.monotonic() + within
        for i, kind in enumerate(schedule(number, seed, list(faults.kinds))):
            if time.monotonic() > ends:
                break
            while trainer.steps() < 1:  # a fault before the first groups would show nothing
                assert trainer.is_alive, trainer.log.read_text()[-3000:]
                time.sleep(0.2)
            time.sleep(faults.random.uniform(0.0, 2.0))
            began = time.monotonic()
            faults.inflict(kind)
            inflicted.append(Fault(kind=kind, seconds=round(time.monotonic() - began, 1), steps=trainer.steps()))
            print(f"{i + 1:4d} {kind:8s} {inflicted[-1].seconds:5.1f} s, {inflicted[-1].steps} steps", flush=True)
        assert inflicted
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
    record = record_of(
        service.state, trainer.output, versions.seen,
        machine=platform.platform(), seed=seed, nodes=nodes, faults=inflicted,
    )  # fmt: skip
    if kept is not None:
        record.write(kept)
    print(record.in_words())
    record.check()


def schedule(number: int, seed: int, kinds: list[str]) -> list[str]:
    """Every kind of fault once per round, each round in a new order."""
    generator = random.Random(seed)
    rounds = [generator.sample(kinds, len(kinds)) for _ in range(-(-number // len(kinds)))]
    return [kind for of_round in rounds for kind in of_round][:number]


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

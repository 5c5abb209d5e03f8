"""Core process: it is forked for an actor, has the actor's environment, ends with it, and reports why it failed."""

import subprocess
import sys
from contextlib import contextmanager

import psutil
import pytest

ACTOR = """
import multiprocessing, os, sys, time
from multiprocessing import forkserver
from rollout_service.vllm_plugin.core_process import CoreContext
from rollout_service.vllm_plugin.parent_death import end_with_parent

def core():
    end_with_parent()
    print(os.getpid(), os.environ["SET_LATER"], flush=True)
    time.sleep(60)

if __name__ == "__main__":
    context = CoreContext() if sys.argv[1] == "forked" else multiprocessing.get_context("spawn")
    forkserver.ensure_running()
    os.environ["SET_LATER"] = "here"
    context.Process(target=core).start()
    time.sleep(60)
"""


@contextmanager
def actor_with_core(folder, how):
    """An actor's process, and the first line that its core process prints."""
    script = folder / "actor.py"
    script.write_text(ACTOR)
    process = subprocess.Popen([sys.executable, str(script), how], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().split()
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("how", ["forked", "spawned"])
def test_a_core_process_ends_with_its_actor_even_when_that_is_killed(tmp_path, how):
    with actor_with_core(tmp_path, how) as (actor, (pid, _)):
        core = psutil.Process(int(pid))
        started = psutil.Process(actor.pid).children(recursive=True)
        assert core in started
        actor.kill()
        assert psutil.wait_procs([core, *started], timeout=10)[1] == []


def test_a_core_process_has_what_its_actor_added_to_the_environment_later(tmp_path):
    with actor_with_core(tmp_path, "forked") as (actor, (pid, value)):
        assert value == "here"
        assert psutil.Process(int(pid)).ppid() != actor.pid  # it is the server's child


FAILING = """
import os, sys
from multiprocessing import forkserver
from rollout_service.vllm_plugin.core_process import CoreContext, says_why_it_failed

def core():
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), 9)
    raise KeyError("layers.0.fc.weight" + 10**5 * "x")

if __name__ == "__main__":
    forkserver.ensure_running()
    process = CoreContext().Process(target=core)
    process.start()
    process.join()
    with says_why_it_failed():
        raise RuntimeError("Engine core initialization failed. See root cause above.")
"""


@pytest.mark.parametrize(
    ("end", "said"), [("raises", "CoreFailed: KeyError: 'layers.0.fc.weight"), ("killed", "RuntimeError: Engine core")]
)
def test_a_core_process_that_fails_tells_its_actor_why(tmp_path, end, said):
    script = tmp_path / "actor.py"
    script.write_text(FAILING)
    ended = subprocess.run([sys.executable, str(script), end], capture_output=True, text=True, timeout=60)
    last = ended.stderr.rstrip().splitlines()[-1]
    assert said in last
    assert len(last) < 5000

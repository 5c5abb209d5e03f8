"""Checks of the CUDA path: `python deploy/gpu/checks/check.py STAGE ...` runs one stage and prints its results.

cuda_kernels.py  vLLM's kernels against torch and drafters.scoring
engine.py        vLLM in this process, as the service configures it: samples, log-probabilities, new weights
lengths.py       time of a step by draft length
pad.py           a policy of 3.6 B parameters that computes the same as the demo's
speed.py         tokens per second of that policy, by streams and draft length
actor.py         the service's fleet and actor, with vLLM's core in its own process, and without Ray
selftest.py      the checks of `rollout-service selftest` on one engine, likewise
"""

import argparse
import importlib
import os

ENVIRONMENT = {
    "VLLM_PLUGINS": "rollout_service",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_USE_DEEP_GEMM": "0",
    # The bundle has no flashinfer. Without this variable vLLM's sampler imports it on an H100.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Without a network, only the loopback interface is certain to exist.
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
}
"""variables that vLLM reads when it is imported; a variable that is already set keeps its value"""
OF_THE_FLEET = ("actor", "selftest")
"""stages with the fleet around the engine"""
KINDS = ("none", "ngram", "draft_model", "eagle3", "mtp")


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """The stage, its module, and its arguments by name. Ends the process if `words` name no stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True)

    stages.add_parser("kernels").set_defaults(module="cuda_kernels")

    for name in ("engine", "selftest"):
        engine = stages.add_parser(name)
        engine.add_argument("kind", choices=KINDS)
        engine.add_argument("dtype", choices=("float32", "bfloat16"))
        engine.add_argument("verification", choices=("auto", "standard", "block"))
        engine.add_argument("graphs", choices=("eager", "graphs"))

    lengths = stages.add_parser("lengths")
    lengths.add_argument("kind", choices=KINDS)
    lengths.add_argument("ranges", choices=("start", "every"))

    stages.add_parser("pad")

    speed = stages.add_parser("speed")
    speed.add_argument("kind", choices=KINDS)

    stages.add_parser("actor")
    return parser.parse_args(words)


def main() -> None:
    arguments = vars(parsed())
    stage, module = arguments.pop("stage"), arguments.pop("module", None)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if stage in OF_THE_FLEET:
        from without_ray import stand_in

        stand_in()
    else:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

    from common import machine, say

    say(stage, *arguments.values(), machine())
    importlib.import_module(module or stage).run(**arguments)
    say("end of", stage)


if __name__ == "__main__":
    main()

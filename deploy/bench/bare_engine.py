"""A bare engine: vLLM's `LLM` with the arguments of the service's engine. It answers each JSON line with a JSON line.

python deploy/bench/bare_engine.py '{"model": ..., ...}'        (a ServiceConfig)

{"ready": true}                                     -> {}  once the engine has started
{"prompts": [[...], ...], "tokens": 48}             -> {"seconds": ..., "tokens": ...}
{"pack": true}                                      -> {"copy": ..., "pack": ...}  seconds, see copy_and_pack
"""

import json
import os
import sys
import time
from typing import Any

from rollout_service.config import ServiceConfig
from rollout_service.engine.arguments import bare_llm, sampling_params
from rollout_service.protocol import GroupRequest, Sampling


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    config = ServiceConfig.model_validate_json(sys.argv[1])
    llm = bare_llm(config)
    for line in sys.stdin:
        answers.write(json.dumps(answer(llm, config, json.loads(line))) + "\n")
        answers.flush()


def answer(llm: Any, config: ServiceConfig, request: dict[str, Any]) -> dict[str, Any]:
    if "prompts" in request:
        sampling = Sampling(temperature=1.0, max_tokens=request["tokens"], ignore_eos=True)
        params = sampling_params(GroupRequest(prompt_token_ids=[0], sampling=sampling))
        began = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": p} for p in request["prompts"]], params, use_tqdm=False)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "tokens": sum(len(o.outputs[0].token_ids) for o in outputs)}
    if "pack" in request:
        return copy_and_pack(config)
    return {}


def copy_and_pack(config: ServiceConfig) -> dict[str, float]:
    """Seconds to copy the checkpoint once in memory, and seconds to pack its matrices for the CPU's kernels."""
    from pathlib import Path

    from vllm import _custom_ops as ops

    from drafters.files.checkpoint_folder import read_tensors
    from drafters.kinds.mtp import is_mtp

    tensors = read_tensors(Path(config.model), lambda name: not is_mtp(name))
    began = time.perf_counter()
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    copied = time.perf_counter() - began
    matrices = [t for name, t in copies.items() if t.dim() == 2 and "embed_tokens" not in name and min(t.shape) >= 16]
    began = time.perf_counter()
    packed = [ops.create_onednn_mm(matrix.t(), 32) for matrix in matrices]
    return {"copy": copied, "pack": time.perf_counter() - began, "matrices": len(packed)}


if __name__ == "__main__":
    main()

"""Stage `engine`: checks that an engine's samples follow the policy, also after new weights."""

import torch
from common import DEVICE, MODELS, RESPONSES, reported, say
from configured import service_config, started
from judging import judgement, sampled
from updates import drafter_tensors, perturbed, push
from vllm import LLM

from drafters.files.checkpoint_folder import read_tensors
from drafters.kinds.mtp import is_mtp
from rollout_service.evaluation.cut import Cut
from rollout_service.evaluation.selftest_checks import law_check

CUTS = (Cut(temperature=1.0), Cut(temperature=0.7, top_p=0.9, top_k=20), Cut(temperature=0.0))


def run(kind: str, dtype: str, verification: str, graphs: str) -> None:
    engine = {"dtype": dtype, "enforce_eager": graphs == "eager"}
    llm = started(service_config(kind, drafter={"verification": verification}, engine=engine))
    config = llm.llm_engine.vllm_config
    runner = type(llm.llm_engine.model_executor.driver_worker.worker.model_runner).__module__
    is_asynchronous, mode = config.scheduler_config.async_scheduling, config.compilation_config.cudagraph_mode.name
    say(f"started; runner {runner}, graphs {mode}, asynchronous {is_asynchronous}")

    reported(f"{kind}, laws:", lambda: laws(llm, kind))
    for cut in CUTS:
        name = f"{kind} {dtype} {verification}, temperature {cut.temperature}, top-p {cut.top_p}, top-k {cut.top_k}:"
        reported(name, lambda cut=cut: judgement(sampled(llm, RESPONSES, cut), MODELS / "policy", cut))
    check_pushes(llm, kind, getattr(torch, dtype))
    check_switches(llm, kind)


def laws(llm: LLM, kind: str) -> str:
    """Deviations of sampler and verification from their law."""
    (deviations,) = llm.collective_rpc("law_deviations", args=(8,))
    return law_check(kind, deviations).figures


def check_pushes(llm: LLM, kind: str, dtype: torch.dtype) -> None:
    """Pushes a new policy, then the same drafter again. Samples must follow the new policy after both."""
    policy, cut = perturbed(MODELS / "policy"), CUTS[0]

    def pushed(tensors: dict[str, torch.Tensor], *, of_drafter: bool) -> str:
        report = push(llm, tensors, dtype, of_drafter=of_drafter)
        return f"{report}; then {judgement(sampled(llm, RESPONSES // 4, cut), policy, cut)}"

    tensors = read_tensors(policy, lambda name: not is_mtp(name))
    reported(f"{kind}, new policy:", lambda: pushed(tensors, of_drafter=False))
    if kind not in ("none", "ngram"):
        reported(f"{kind}, same drafter:", lambda: pushed(drafter_tensors(kind), of_drafter=True))


def check_switches(llm: LLM, kind: str) -> None:
    """Makes the changes that `compare` and `audit` make to a running engine. The last one changes the runner."""
    of_a_cpu = [("set_draft_sampling", ("greedy",)), ("let_drafter_idle", ())] if DEVICE == "cpu" else []
    for method, arguments in [("set_verification", ("block",)), *of_a_cpu]:
        reported(f"{kind}, {method}:", lambda m=method, a=arguments: str(llm.collective_rpc(m, args=a)))

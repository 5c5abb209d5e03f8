"""Routed experts on a CPU: which experts the policy's routers chose for each token, returned with each completion.

vLLM has what records them: callbacks of the routers, blocks that are shared as the prefix cache's are, and the rows of
accepted tokens in a completion. Only its V2 model runner, which runs on GPUs, hands the steps to it, and vLLM refuses
the option elsewhere. Here the V1 runner hands its steps over too. Without asynchronous scheduling, a step's rows are
there as soon as its tokens are sampled.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np

from rollout_service.vllm_plugin.patch import Patch

CONFIG = "vllm.config.vllm.VllmConfig._verify_aux_output_compatibility"
RUNNER = "vllm.v1.worker.gpu_model_runner.GPUModelRunner"
CONNECTOR = "vllm.distributed.aux_output_connector.worker"


class RoutedExperts:
    """Stands in for two methods of vLLM's model runner, and calls them."""

    def __init__(self, runner: Any):
        for patch in ROUTED_EXPERTS:
            patch.check()
        from vllm.distributed.aux_output_connector.worker import get_aux_output_connector

        self.runner = runner
        self.connector = get_aux_output_connector(runner.get_model(), runner.vllm_config, runner.kv_cache_config)
        self.drafts: dict[str, list[int]] = {}
        """those that the step verifies, by request"""
        self.stock_execute, self.stock_sample = runner.execute_model, runner.sample_tokens
        runner.execute_model, runner.sample_tokens = self.execute_model, self.sample_tokens

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> Any:
        self.drafts = scheduler_output.scheduled_spec_decode_tokens
        self.connector.begin_step(scheduler_output.aux_output_connector_metadata)
        return self.stock_execute(scheduler_output, intermediate_tensors)

    def sample_tokens(self, grammar_output: Any) -> Any:
        batch = self.runner.input_batch
        requests = batch.req_ids.copy()
        step: Any = SimpleNamespace(
            req_ids=requests,
            query_start_loc_np=self.runner.query_start_loc.np[: len(requests) + 1].copy(),
            num_computed_tokens_np=batch.num_computed_tokens_cpu[: len(requests)].copy(),
        )
        pending = self.connector.prepare_output(step)  # before the drafter prepares a batch of its own
        output = self.stock_sample(grammar_output)
        if pending is not None:  # only the first rank keeps what the routers chose
            sampled = np.array([len(tokens) for tokens in output.sampled_token_ids])
            drafted = np.array([len(self.drafts.get(request, ())) for request in requests])
            pending.enqueue_cpu_copy(sampled, np.where(sampled > 0, drafted - (sampled - 1), 0))
            output.aux_output_connector_output = pending.process_output()
        return output


def allow_on_a_cpu() -> None:
    from vllm.config import VllmConfig
    from vllm.platforms import current_platform

    stock = VllmConfig._verify_aux_output_compatibility

    def verify(self: Any) -> None:
        # The service's configuration has the rules that hold on a CPU too (engine.routed_experts).
        if not current_platform.is_cpu():
            stock(self)

    VllmConfig._verify_aux_output_compatibility = verify  # type: ignore[method-assign]


SHOWN_BY = "tests/integration/test_routed_experts.py::test_the_rows_are_the_experts_that_a_recomputation_chooses"
UNNEEDED = "vLLM's V1 runner returns routed experts, or a CPU has the V2 runner"

RETURNED_ON_A_CPU = Patch(
    CONFIG,
    "it refuses to return routed experts with the V1 runner, which is the only one on a CPU",
    when="in each of vLLM's processes when the plugin is loaded; it changes what happens on a CPU alone",
    unneeded=UNNEEDED,
    apply=allow_on_a_cpu,
    shown_by=SHOWN_BY,
    relies_on={CONFIG: "self"},
)
USED = {
    f"{CONNECTOR}.get_aux_output_connector": "model, vllm_config, kv_cache_config",
    f"{CONNECTOR}.AuxOutputWorkerConnector.begin_step": "self, metadata",
    f"{CONNECTOR}.AuxOutputWorkerConnector.prepare_output": "self, input_batch",
    f"{CONNECTOR}.PendingAuxOutput.enqueue_cpu_copy": "self, num_sampled, num_rejected",
    f"{CONNECTOR}.PendingAuxOutput.process_output": "self",
}
ROUTED_EXPERTS = [
    Patch(
        f"{RUNNER}.{name}",
        reason,
        when="on the runner's own object on a CPU, with engine.routed_experts",
        unneeded=UNNEEDED,
        apply=RoutedExperts,
        shown_by=SHOWN_BY,
        relies_on={f"{RUNNER}.{name}": parameters, **USED},
    )
    for name, reason, parameters in (
        (
            "execute_model",
            "it does not tell vLLM's connector of routed experts which requests a step has",
            "self, scheduler_output, intermediate_tensors",
        ),
        (
            "sample_tokens",
            "it does not hand over the rows of the accepted tokens",
            "self, grammar_output",
        ),
    )
]

"""Engine: the Ray actor around one vLLM AsyncLLM.

An actor is empty until `start`, even after Ray has restarted it. The fleet lets it load the weights in service before
it serves, so an engine never serves a token of an outdated version. When vLLM's core process dies, the actor ends too,
and Ray makes a new one.
"""

import asyncio
import functools
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import ray

from drafters.registry import make_drafter
from drafters.schedule import Range, StepCosts
from rollout_service.config import ServiceConfig
from rollout_service.engine.arguments import check_runner, engine_arguments, names_engine_arguments, sampling_params
from rollout_service.engine.completions import completion_of, draft_steps, speculation_of, weight_spans
from rollout_service.engine.control import EngineControl
from rollout_service.engine.hardware import runner_of
from rollout_service.engine.http_server import HttpServer
from rollout_service.engine.loading import Loaded, Versions, WeightsFile, check_all_parts, check_all_ranks, on_this_node
from rollout_service.engine.openai_app import openai_app, openai_schemas
from rollout_service.engine.openai_arguments import check_parsers
from rollout_service.engine.pausing import PauseMode
from rollout_service.engine.recurrent_layers import check_by_vllm
from rollout_service.engine.switches import SWITCHED, check_switches
from rollout_service.imports import uncollected
from rollout_service.protocol import Completion, DraftSchedule, Group, GroupRequest, RolloutRecord
from rollout_service.vllm_plugin.cache_salt import CACHE_SALT
from rollout_service.vllm_plugin.core_process import CORE_PROCESS, prepare_core_process, says_why_it_failed
from rollout_service.vllm_plugin.watched_outputs import WATCHED_OUTPUTS, Sampled

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput

    from rollout_service.engine.measuring import Plan
    from rollout_service.engine.step_costs import Measured

T = TypeVar("T")


class NotStarted(RuntimeError):
    """The actor is new: the engine before it has died, and the fleet has not started this one yet."""


class Started(NamedTuple):
    """What an engine says when it can serve."""

    replaced: dict[str, str]
    """functions of vLLM that were found wrong on this platform and replaced, with the reasons"""
    costs: StepCosts | None
    """costs of its steps, if they were measured, for the engine that takes its place after a restart"""
    openai_schemas: dict[str, dict[str, Any]]
    """schemas of the bodies of vLLM's own routes, by path"""
    address: str
    """where its HTTP server listens for requests to these routes"""
    node: str
    """Ray's id of its node"""


class Aborted(NamedTuple):
    """A group that was ended before it was finished, and the number of tokens that were generated in vain."""

    tokens: int


PAUSE_MODES: dict[str, PauseMode] = {"drain": "wait", "restart": "abort", "keep": "keep"}
"""vLLM's name for what happens to running completions at a weight update"""


def of_a_started_engine(method: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
    """Raise NotStarted in an empty actor. End the actor's process when vLLM's core process turns out to be dead, so
    that Ray makes a new actor."""

    @functools.wraps(method)
    async def call(self: "Engine", *args: Any, **kwargs: Any) -> T:
        self._must_be_started()
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return await method(self, *args, **kwargs)
        except EngineDeadError:
            os._exit(1)

    return call


class Engine:
    """The fleet makes it an actor (`ray.remote(Engine)`). It has no sync methods, because they would block
    generation."""

    def __init__(
        self, config: dict[str, Any], model_folder: str, device: str, index: int, service_folder: str, key: str
    ):
        """`service_folder` is the service's own, in the memory of the front's machine. `key`: what the front shows to
        engines on other machines."""
        self.config = ServiceConfig.model_validate(config)
        self.model_folder, self.device, self.index = model_folder, device, index
        self.runner = runner_of(device)
        self.service_folder, self.key = Path(service_folder), key
        self.llm: Any = None
        self.versions = Versions(0, 0)
        """versions that it holds; a push is published once every engine holds it"""
        self.ran: dict[str, str] = {}
        """how it samples and verifies drafts"""
        prepare_core_process()

    async def start(self, costs: StepCosts | None) -> Started:
        """Load the checkpoint. `costs` are those that an earlier engine measured here. Then it takes the weights in
        service by `load`.

        If the actor is started already, it ends: the fleet lost sight of it and took it for dead. Nobody waits for what
        it runs, and a second vLLM would not fit beside it. Ray makes a new actor.
        """
        if self.llm is not None:
            os._exit(1)
        with uncollected():
            from vllm.usage.usage_lib import UsageContext
            from vllm.v1.engine.async_llm import AsyncLLM

            from rollout_service.engine.draft_lengths import DraftLengths
            from rollout_service.engine.measuring import measure_at_start, served_metrics
            from rollout_service.engine.speculation_stats import SpeculationCounts
            from rollout_service.engine.step_costs import StepTimes

        CORE_PROCESS.ensure()
        self.counts, self.times = SpeculationCounts(lambda: self.versions), StepTimes()
        self.lengths = DraftLengths(self.config.drafter, self.config.engine.max_num_seqs, self.runner)
        loggers = (self.counts, self.times, self.lengths)
        adjustable = self.lengths.ranges if self.lengths.adjustable else None
        with names_engine_arguments(self.config):
            arguments = engine_arguments(self.config, self.model_folder, self.device, self.index, adjustable)
            vllm_config = arguments.create_engine_config(UsageContext.ENGINE_CONTEXT)
            check_runner(vllm_config, self.device)
        check_by_vllm(vllm_config, self.device)
        stat_loggers: list[Any] = [*(lambda *_, own=own: own for own in loggers), served_metrics(self.times)]
        with names_engine_arguments(self.config), says_why_it_failed():
            self.llm = AsyncLLM.from_vllm_config(
                vllm_config,
                stat_loggers=stat_loggers,
                enable_log_requests=arguments.enable_log_requests,
                disable_log_stats=arguments.disable_log_stats,
            )
        await self.lengths.started(self.llm.engine_core)
        check_parsers(self.config.openai, self.config.served_name, self.llm.renderer.get_tokenizer())
        self.controls = EngineControl(self.llm)
        if self.config.weights.keeps_cache:
            CACHE_SALT.apply_to(self.llm, lambda: self.versions.policy)
        WATCHED_OUTPUTS.apply_to(self.llm, self._choice_on_vllms_routes)
        # vLLM's own routes check lengths against this process's copy, so they keep the drafter's positions free too.
        self.llm.model_config.max_model_len = self.config.context_limit
        await self.llm.update_weight_version("0")
        if self.runner == "v1" and self.config.engine.routed_experts:
            await self.llm.collective_rpc("return_routed_experts")
        await self.set_verification(self.config.drafter.verification)
        await self.llm.collective_rpc("check_law")
        if self.runner == "v1" and make_drafter(self.config.drafter).samples:
            await self.llm.collective_rpc("let_drafter_idle")
        if self.lengths.is_measured_at_start:
            costs = costs or await measure_at_start(self.llm, self.times, self.lengths, self.config.context_limit)
            self.counts.forget()
            await self.lengths.measured(costs)
        make_app = functools.partial(openai_app, self.llm, self.config)
        self.server = HttpServer(self.llm, make_app, self.service_folder, self.key, self.index)
        replaced = (await self.llm.collective_rpc("replaced_functions"))[0]
        node = ray.get_runtime_context().get_node_id()
        return Started(replaced, costs, openai_schemas(), self.server.start(), node)

    async def measure(self, plan: "Plan") -> "Measured":
        """Measure the costs of steps, while nothing else is generated."""
        from rollout_service.engine.measuring import measure

        return await measure(self.llm, self.times, self.lengths, plan)

    async def set_draft_lengths(self, ranges: list[Range]) -> None:
        """Use another schedule from the next step on, which acceptance does not change. Raises ValueError when it is
        wrong, or when `drafter.schedule` is fixed."""
        await self.lengths.set(ranges)

    @of_a_started_engine
    async def schedule(self) -> DraftSchedule:
        """How many tokens are drafted at present, and why."""
        return self.lengths.status(self.index)

    async def stop(self) -> None:
        """End vLLM's core process and release what it shares. The fleet ends the actor itself."""
        if self.llm is not None:
            self.llm.shutdown()

    @of_a_started_engine
    async def generate(self, group: GroupRequest, key: str) -> Group | Aborted:
        """Generate all completions of one group, which has `prompt_token_ids`. `abort(key)` and some weight updates end
        it early."""
        assert group.prompt_token_ids is not None
        prompt = {"prompt_token_ids": group.prompt_token_ids}
        final: Any = None
        async for output in self.llm.generate(prompt, sampling_params(group), key):
            final = output
        if any(output.finish_reason == "abort" for output in final.outputs):
            return Aborted(sum(len(output.token_ids) for output in final.outputs))
        return Group(
            id=group.id or "",
            prompt_token_ids=group.prompt_token_ids,
            completions=[self._completion(output, group) for output in final.outputs],
            sampling=group.sampling,
            engine=self.index,
            metadata=group.metadata,
        )

    @of_a_started_engine
    async def abort(self, key: str) -> None:
        """End the group that `generate` was given this key for. Nothing happens if it has finished."""
        await self.llm.abort(key)

    def _completion(self, output: "CompletionOutput", group: GroupRequest) -> Completion:
        self.counts.add_contexts(len(group.prompt_token_ids or ()), draft_steps(output))
        return completion_of(
            output,
            self.config.drafter.kind,
            self.versions.drafter,
            with_steps=group.draft_steps,
            with_experts=group.routed_experts,
        )

    def _choice_on_vllms_routes(
        self, prompt_token_ids: list[int], output: "CompletionOutput", sampled: Sampled | None
    ) -> RolloutRecord | None:
        """Count a choice that ended on vLLM's own routes. Returns its record if `sampled` was collected."""
        self.counts.add_contexts(len(prompt_token_ids), draft_steps(output))
        if sampled is None:
            return None
        return RolloutRecord(
            prompt_token_ids=prompt_token_ids,
            token_ids=sampled.token_ids,
            logprobs=sampled.logprobs,
            weight_versions=weight_spans(output),
            speculation=speculation_of(output, self.config.drafter.kind, self.versions.drafter, with_steps=False),
            engine=self.index,
        )

    @of_a_started_engine
    async def relabel(self, version: int) -> None:
        """Call the policy that the engine holds `version` from the next step on."""
        self.versions = self.versions._replace(policy=version)
        await self.llm.update_weight_version(str(version))

    @of_a_started_engine
    async def control(self, what: str, *arguments: Any) -> Any:
        """A method of `EngineControl`."""
        return await getattr(self.controls, what)(*arguments)

    @of_a_started_engine
    async def load(self, weights: WeightsFile, of_drafter: bool) -> Loaded:
        """Load a version in place. `weights.running` decides what happens to running completions meanwhile, except that
        those which a client has paused stay as they are.

        Raises DifferentBytes when the bytes that it read have another checksum; nothing has changed then. Raises
        HalfLoaded when that is so on some ranks only."""
        settings, began = self.config.weights, time.monotonic()
        async with self.controls.for_an_update() as pause, on_this_node(weights) as file:
            await asyncio.gather(
                self.llm.collective_rpc("read_checkpoint_tensors", args=(str(file), len(weights.parts) or 1)),
                pause(PAUSE_MODES[settings.running], not settings.keeps_cache),
            )
            if weights.parts:  # before any rank loads, since each knows its own part only
                read = await self.llm.collective_rpc("checksum_that_was_read")
                check_all_parts(read, weights.parts)
            arguments = (weights.checksum, of_drafter, weights.parts)
            reports = await self.llm.collective_rpc("load_checkpoint_tensors", args=arguments)
            check_all_ranks([report["checksum"] for report in reports], weights.checksum)
            if of_drafter:
                self.versions = self.versions._replace(drafter=weights.version)
                await self.lengths.new_drafter()
            else:
                await self.relabel(weights.version)
        changed = sum(report["changed"] for report in reports)
        return Loaded(time.monotonic() - began, changed, reports[0]["modules"])

    async def set_draft_sampling(self, draft_sampling: str) -> None:
        """Switch between sampled and greedy drafts without a restart. Both are verified exactly. Raises ValueError if
        vLLM's model runner cannot switch."""
        started = self.config.drafter
        check_switches(started, started.model_copy(update={"draft_sampling": draft_sampling}), self.runner)
        if "draft_sampling" in SWITCHED[self.runner]:
            await self._switch("set_draft_sampling", draft_sampling)

    async def set_verification(self, verification: str) -> None:
        """Switch how drafts are verified without a restart. Both ways are exact."""
        await self._switch("set_verification", verification)

    @of_a_started_engine
    async def running(self) -> dict[str, str]:
        """How drafts are sampled and verified now, as vLLM's worker says; empty without a drafter."""
        return self.ran

    async def _switch(self, method: str, value: str) -> None:
        await self.llm.collective_rpc(method, args=(value,))
        self.ran = (await self.llm.collective_rpc("running"))[0]

    @of_a_started_engine
    async def speculation(self) -> list[dict[str, Any]]:
        return self.counts.rows()

    @of_a_started_engine
    async def context_acceptance(self) -> dict[int, list[int]]:
        """Histograms of accepted drafts by context length, as `drafters.acceptance.by_context_length` counts them."""
        return {floor: acceptance.histogram for floor, acceptance in self.counts.by_context.items()}

    @of_a_started_engine
    async def metrics(self) -> str:
        """vLLM's Prometheus metrics of this engine, in text format."""
        from prometheus_client import REGISTRY, generate_latest

        return generate_latest(REGISTRY).decode()

    @of_a_started_engine
    async def check(self) -> None:
        """Return when vLLM's core process answers."""
        await self.llm.get_weight_version()

    def _must_be_started(self) -> None:
        if self.llm is None:
            raise NotStarted(f"engine {self.index} is not started")

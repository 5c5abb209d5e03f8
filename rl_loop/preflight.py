"""Checks before training starts: the output folder, the device and its memory, the losses, and the endpoint.

rl_loop/prompt_lengths.py checks the prompts.
"""

import time
from pathlib import Path

import httpx
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from drafters.devices import choose_device
from drafters.expert_routing import find_routers
from drafters.files.disk_space import mib
from drafters.files.durable import check_folder
from drafters.files.model_folder import resolve_model
from rl_loop.config import TrainConfig
from rl_loop.learner.memory import device_memory, memory_needs, policy_without_weights
from rl_loop.losses.custom_loss import CustomLoss
from rl_loop.reports.metrics_log import STEPS_FILE
from rl_loop.run.checkpoint import checkpoints
from rollout_service.client import RolloutClient, RolloutError

POLL_SECONDS = 1.0
SHORTEST_TRY = 1.0
"""seconds that each try waits for an answer, even if less is left of `ready_timeout`"""
READY_WITHIN = 10.0
"""seconds to wait for the answer whether every engine is in service"""
OWN_CONTEXT = 1 << 30
"""a GPU with more than this many bytes in use has another user: CUDA's own context takes about half of it"""


class PreflightError(RuntimeError):
    """A check failed before training. The message says what is wrong and what to do."""


def check_output(config: TrainConfig) -> None:
    try:
        check_folder(config.output, "output")
    except ValueError as error:
        raise PreflightError(str(error)) from error
    found = checkpoints(config.output)
    if not config.resume and (found or (config.output / STEPS_FILE).exists()):
        raise PreflightError(f"output: {config.output} has a run: continue it with --resume, or choose another folder")


def model_folder(config: TrainConfig) -> Path:
    """The policy's folder. A Hugging Face name that is not cached is downloaded. Raises PreflightError when there is no
    such policy, or no drafter at `online_drafter.model`."""
    try:
        if config.online_drafter.kind != "none" and config.online_drafter.model is not None:
            resolve_model(config.online_drafter.model, "online_drafter.model")
        return resolve_model(config.model)
    except ValueError as error:
        raise PreflightError(str(error)) from error


def check_device(config: TrainConfig) -> None:
    try:
        choose_device(config.device)
    except ValueError as error:
        raise PreflightError(str(error)) from error


def check_memory(config: TrainConfig, longest: int, console: Console) -> None:
    """Print what memory the learner will need, and warn if others use its GPU too. Raises PreflightError when it needs
    more than is free. `longest`: the most tokens that a rollout may have."""
    folder, device = model_folder(config), choose_device(config.device)
    try:
        needs = memory_needs(config, folder, device, longest)
    except (OSError, ValueError) as error:
        raise PreflightError(f"model: {config.model}: {error}") from error
    memory = device_memory(device)
    table = Table("memory of the learner", device.type, box=SIMPLE)
    for name, count in needs._asdict().items():
        table.add_row(name.replace("_", " "), mib(count))
    table.add_row("total", mib(needs.total))
    table.add_row("free", f"{mib(memory.free)} of {mib(memory.total)}")
    console.print(table)
    in_use = memory.total - memory.free
    if device.type == "cuda" and in_use > OWN_CONTEXT:
        console.print(
            f"device: {device} is shared: others, such as an engine, hold {mib(in_use)} of its {mib(memory.total)}, "
            f"and the learner needs about {mib(needs.total)}. To give it a GPU of its own, start rl-loop and the "
            "service with different CUDA_VISIBLE_DEVICES.",
            style="yellow", soft_wrap=True,
        )  # fmt: skip
    if needs.total > memory.free:
        raise PreflightError(
            f"device: the learner needs about {mib(needs.total)} on {device}, and {mib(memory.free)} of "
            f"{mib(memory.total)} are free. Lower max_tokens_per_microbatch, set gradient_checkpointing = true or "
            'weights_dtype = "bfloat16", choose another device, or train a smaller policy'
        )


def check_loss(config: TrainConfig) -> None:
    """Raises CustomFunctionError when the user's own loss cannot be loaded."""
    if isinstance(config.loss, CustomLoss):
        _ = config.loss.function


def check_router(config: TrainConfig) -> None:
    """Raises PreflightError when routers are to be trained that the policy does not have."""
    if config.router_coefficient == 0.0:
        return
    try:
        policy = policy_without_weights(model_folder(config))
    except (OSError, ValueError) as error:
        raise PreflightError(f"model: {config.model}: {error}") from error
    if not find_routers(policy):
        raise PreflightError(
            f"router_coefficient: {config.model} ({type(policy).__name__}) has no routers that can be balanced: it is "
            "dense, or routes in a way that is not known here. Leave router_coefficient out"
        )


def wait_until_ready(client: RolloutClient, config: TrainConfig, console: Console) -> None:
    """Returns when every engine answers. Raises RolloutError when the service refuses the request, and PreflightError
    after `ready_timeout`, also when something listens there and never answers."""
    deadline = time.monotonic() + config.ready_timeout
    with console.status(f"waiting for {config.endpoint} to be ready (at most {config.ready_timeout:.0f} s)"):
        while (reason := _why_not_ready(client, deadline)) is not None:
            if time.monotonic() >= deadline:
                raise PreflightError(
                    f"endpoint: {config.endpoint} is not ready after {config.ready_timeout:.0f} s: {reason}. "
                    "Is `rollout-service launch` running?"
                )
            time.sleep(max(0.0, min(POLL_SECONDS, deadline - time.monotonic())))


def _why_not_ready(client: RolloutClient, deadline: float) -> str | None:
    def left() -> float:
        return max(SHORTEST_TRY, deadline - time.monotonic())

    try:
        client.model(within=left())
    except httpx.TransportError as error:
        return str(error) or type(error).__name__
    except RolloutError as error:
        if error.status < 500:  # the token is wrong, or this is another kind of server: waiting does not help
            raise
        return str(error)
    return None if client.ready(within=min(READY_WITHIN, left())) else "not every engine answers"


def check_owner(client: RolloutClient, config: TrainConfig, run: str) -> None:
    """Raises PreflightError when the service's weights belong to another run, unless `take_over` is set."""
    status = client.weights()
    weights = {"policy": status.policy}
    if config.online_drafter.kind != "none" and status.drafter is not None:
        weights["drafter"] = status.drafter
    for of, in_service in weights.items():
        if in_service.run not in (None, run) and not config.take_over:
            raise PreflightError(
                f"endpoint: {config.endpoint} serves {of} version {in_service.version} of the run {in_service.run!r}, "
                f"and this is the run {run!r}. Wait until that run ends; or, if it was killed, resume it (--resume, "
                "with its output folder); or take over the service from it (--take_over)"
            )


def check_router_replay(client: RolloutClient, config: TrainConfig) -> None:
    """Raises PreflightError when the run is to replay routed experts, and the service does not record them."""
    if config.router_replay and not client.model().get("routed_experts"):
        raise PreflightError(
            f"router_replay: {config.endpoint} does not record the experts that its policy's routers choose; launch it "
            "with engine.routed_experts = true"
        )


def warn_of_memory_queue(client: RolloutClient, config: TrainConfig, console: Console) -> None:
    """Warn an asynchronous run if the service keeps its queue in memory only. The run goes on."""
    if config.mode == "async" and not client.batches().persistent:
        console.print(
            f"{config.endpoint} keeps its queue and weights in memory and loses them if it dies. "
            "Launch it with `--state FOLDER` to keep them on disk.",
            style="yellow", soft_wrap=True,
        )  # fmt: skip


def check_drafter(client: RolloutClient, config: TrainConfig) -> None:
    """Raises PreflightError when the service does not draft with the kind of drafter that is to be trained."""
    if config.online_drafter.kind == "none":
        return
    served = [drafter.drafter for drafter in client.speculation().drafters]
    if served != [config.online_drafter.kind]:
        raise PreflightError(
            f"online_drafter.kind: {config.endpoint} drafts with {' and '.join(served) or 'none'}, not "
            f"{config.online_drafter.kind}; start the service with that drafter, or set online_drafter.kind to the "
            "one that it has"
        )

"""The run of `rl-loop train`, after its configuration is read: it checks, builds the parts and runs the loop.

The loop may end by its last step, a signal, a failure of the endpoint or any other error. In each case the run leaves a
checkpoint of the last finished step, if the disk has room, and releases the service's weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from statistics import mean

import torch
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

import drafters.latent_moe  # noqa: F401  (which transformers then knows)
from drafters.files.disk_space import NoRoom
from drafters.files.stored_format import OtherFormat
from rl_loop.config import TrainConfig
from rl_loop.learner.carried_tensors import Carried
from rl_loop.learner.local_learner import LocalLearner, load_policy
from rl_loop.learner.online_drafter import OnlineDrafter
from rl_loop.learner.policy_learner import PolicyLearner
from rl_loop.loops.asynchronous import AsynchronousLoop
from rl_loop.loops.interruption import Interruption
from rl_loop.loops.loop import TrainingLoop
from rl_loop.loops.ownership import Ownership, new_run
from rl_loop.loops.recording import Recorder, Recording, ReplaySource
from rl_loop.loops.sources import EndpointSource
from rl_loop.loops.synchronous import SynchronousLoop
from rl_loop.preflight import (
    PreflightError,
    check_device,
    check_drafter,
    check_loss,
    check_memory,
    check_output,
    check_owner,
    check_router,
    check_router_replay,
    model_folder,
    wait_until_ready,
    warn_of_memory_queue,
)
from rl_loop.prompt_lengths import FittingTask, PromptLengths, fitting_task
from rl_loop.reports.costs import run_costs, served
from rl_loop.reports.drafter_plot import plot_acceptance
from rl_loop.reports.metrics_log import MetricsLog
from rl_loop.reports.reporting import Reporter
from rl_loop.reports.router_plot import plot_routers
from rl_loop.reports.summary import write_summary
from rl_loop.run.checkpoint import RunState, checkpoint_to_resume, read_state, restore_checkpoint
from rl_loop.tasks import Task, make_task
from rl_loop.tasks.rewards import Rewards, RewardsHere
from rl_loop.tasks.rewards_pool import RewardsPool
from rollout_service.client import RolloutClient


def run_training(config: TrainConfig, interruption: Interruption) -> None:
    """Raises PreflightError, CustomFunctionError and TaskError before the first step. Interrupted and every later error
    are raised after a checkpoint is written, or after a message says why it could not be."""
    console = Console()
    transformers_logging.disable_progress_bar()  # its progress bars would break the live table
    check_output(config)
    check_device(config)
    check_loss(config)
    check_router(config)
    task = make_task(config.task)
    tokenizer = load_tokenizer(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    state = begin_state(config)
    lengths = PromptLengths(task, tokenizer)
    with console.status("measuring prompts"):
        measured = lengths.measure(config)
    with open_source(config, state, console) as source:
        limit = source.context_limit()
        serves = served(source.client, config) if isinstance(source, EndpointSource) else None
        task = fitting_task(config, lengths, measured, limit, console)
        longest = max(tokens for of_split in measured.values() for tokens in of_split.values())
        longest += config.sampling.max_tokens
        check_memory(config, longest if limit is None else min(longest, limit), console)
        with console.status(f"loading {config.model}"):
            learner, drafter = make_learners(config)
        log = MetricsLog(config.output, state.step, config.tensorboard)
        (config.output / "config.json").write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
        with Reporter(log, config.steps, console) as reporter, open_rewards(config, task) as rewards:
            recording = open_recording(config, limit)
            loop = make_loop(
                config, task, learner, tokenizer, source, rewards, reporter, state, interruption, drafter, recording
            )
            try:
                loop.run()
            except NoRoom:  # no room for another checkpoint: the earlier ones stay
                raise
            except BaseException:
                leave_checkpoint(loop, console)
                raise
            finally:
                source.publisher.release()
        for alarm in source.alarms():
            console.print(f"the service raised alarm {alarm.kind}: {alarm.message}", style="bold red", soft_wrap=True)
    skipped = len(task.skipped) if isinstance(task, FittingTask) else 0
    costs = run_costs(config, model_folder(config), serves, mean(measured["train"].values()), log.steps)
    write_summary(config.output, log.steps, log.evaluations, console, prompts_skipped=skipped, costs=costs)
    if log.drafter:
        plot_acceptance(config.output / "acceptance.png", log.steps, log.drafter)
    if routed := {metrics.step: metrics for metrics in log.steps if metrics.expert_load}:
        plot_routers(config.output / "router.png", routed)


def leave_checkpoint(loop: TrainingLoop, console: Console) -> None:
    """Write a checkpoint when something ends the run. An error in this is printed, so that it does not hide why the run
    ended."""
    step = loop.state.step
    try:
        folder = loop.save()
    except Exception as error:
        console.print(f"the checkpoint of step {step} was not written: {error}", style="bold red", soft_wrap=True)
        return
    more = f", with some updates of step {step + 1}," if loop.learner.holds_part_of_a_step else ""
    console.print(f"the state after step {step}{more} is in {folder}; continue with --resume", soft_wrap=True)


def make_loop(
    config: TrainConfig, task: Task, learner: PolicyLearner, tokenizer: PreTrainedTokenizerBase,
    source: EndpointSource | ReplaySource, rewards: Rewards, reporter: Reporter, state: RunState,
    interruption: Interruption, drafter: OnlineDrafter | None, recording: Recording | None,
) -> TrainingLoop:  # fmt: skip
    parts = rewards, reporter, state, interruption, drafter
    if config.mode == "sync" or isinstance(source, ReplaySource):
        recorded = source if recording is None else Recorder(source, recording)
        return SynchronousLoop(config, task, learner, tokenizer, recorded, *parts)
    return AsynchronousLoop(config, task, learner, tokenizer, source, *parts, recording)


def load_tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase:
    folder = model_folder(config)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise PreflightError(f"model: {folder}: {error}") from error


def begin_state(config: TrainConfig) -> RunState:
    """The state of a new run, or that of the latest checkpoint."""
    latest = checkpoint_to_resume(config)
    try:
        state = RunState() if latest is None else read_state(latest)
    except OtherFormat as error:
        raise PreflightError(str(error)) from error
    state.run = state.run or new_run(config.output)
    return state


def make_learners(config: TrainConfig) -> tuple[PolicyLearner, OnlineDrafter | None]:
    """The learners of the policy and the drafter, new or restored from the latest checkpoint. Restoring also sets the
    random generators."""
    folder, latest = model_folder(config), checkpoint_to_resume(config)
    try:
        dtype = getattr(torch, config.weights_dtype)
        policy = load_policy(folder, dtype)
        reference = load_policy(folder, dtype) if config.kl_coefficient > 0.0 else None
        learner = LocalLearner(config, policy, reference, Carried.read(folder))
    except (OSError, ValueError) as error:
        raise PreflightError(f"model: {config.model}: {error}") from error
    try:
        # The drafter is checked against the policy that the service started with, as the engines checked it, and not
        # against the latest checkpoint's.
        drafter = None if config.online_drafter.kind == "none" else OnlineDrafter.load(config, policy)
    except (OSError, ValueError, RuntimeError) as error:
        raise PreflightError(f"online_drafter.model: {error}") from error
    if latest is not None:
        try:
            restore_checkpoint(latest, learner, drafter)
        except (OSError, ValueError, RuntimeError) as error:
            raise PreflightError(f"output: cannot resume from {latest}: {error}") from error
    return learner, drafter


@contextmanager
def open_rewards(config: TrainConfig, task: Task) -> Iterator[Rewards]:
    """Rewards in worker processes, or in this process."""
    if config.reward_processes == 0:
        yield RewardsHere(task)
        return
    with RewardsPool(partial(make_task, config.task), config.reward_processes, config.reward_timeout) as pool:
        yield pool


def open_recording(config: TrainConfig, context_limit: int | None) -> Recording | None:
    if not config.record_rollouts:
        return None
    try:
        return Recording(config.output / "rollouts", context_limit if config.task.overlong == "skip" else None)
    except OtherFormat as error:
        raise PreflightError(str(error)) from error


@contextmanager
def open_source(config: TrainConfig, state: RunState, console: Console) -> Iterator[EndpointSource | ReplaySource]:
    """The recording, or the endpoint after it is ready and has passed the checks for the run of `state`."""
    if config.replay is not None:
        try:
            recorded = ReplaySource(config.replay)
        except OtherFormat as error:
            raise PreflightError(f"replay: {error}") from error
        yield recorded
        return
    token = None if config.token is None else config.token.get_secret_value()
    with RolloutClient(config.endpoint, token, ca_file=config.ca_file) as client:
        wait_until_ready(client, config, console)
        check_owner(client, config, state.run)
        check_drafter(client, config)
        check_router_replay(client, config)
        warn_of_memory_queue(client, config, console)
        yield EndpointSource(Ownership(client, state.run, config.take_over, state.pushed))

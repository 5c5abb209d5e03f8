"""One engine of a self-test: what is asked of it, in this order.

laws             tokens of known distributions go through the engine's own sampler and verification
samples          at each temperature, judged by the exact policy as `audit` does
draft lengths    each is set, and steps must have it
new drafter      noise instead of the drafter: fewer drafts are accepted; then the drafter again
new policy       a policy with a little noise: the next samples must follow it
"""

import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import torch
from rich.progress import Progress

from drafters.kinds.mtp import is_mtp
from drafters.registry import DrafterConfig, make_drafter
from drafters.scoring import join_scores
from rollout_service.engine.measuring import Plan
from rollout_service.evaluation.arms import EngineArm, name_of
from rollout_service.evaluation.audit import Contexts
from rollout_service.evaluation.audit_config import Setting
from rollout_service.evaluation.audit_row import AuditRow, Level, judge
from rollout_service.evaluation.cut import Cut
from rollout_service.evaluation.exact_policy import Recomputation, Response
from rollout_service.evaluation.noisy_copy import noisy_copy
from rollout_service.evaluation.prompts import read_prompts
from rollout_service.evaluation.running import generate_all
from rollout_service.evaluation.selftest_checks import (
    Check,
    failed_with,
    law_check,
    lengths_check,
    new_drafter_check,
    new_policy_check,
    samples_check,
    start_check,
)
from rollout_service.evaluation.selftest_config import SelftestConfig
from rollout_service.fleet.member import in_words
from rollout_service.protocol import Group, GroupRequest, WeightsOf

SCALE = 4
"""times as many tokens as an engine compares with their law when it starts"""
BATCH = 8
"""responses at a time whose steps are timed, and whose acceptance is measured"""
STEPS = 4
TIMED_PROMPT = 16
"""most tokens of a prompt before timed steps, so that there is room for many long drafts"""
RESPONSES, RESPONSE_TOKENS, PROMPT_TOKENS = 64, 32, 64
"""of the measurement of acceptance; longer prompts are cut"""
POLICY_NOISE, DRAFTER_NOISE = 0.05, 1.0
"""relative to a matrix. The first leaves a policy that is sure of its tokens, the second nothing of a drafter"""


async def check_engine(engine: "CheckedEngine", bar: Progress) -> list[Check]:
    """Start the engine, check it, and stop it. An error in a check is a failed check, and the next ones run."""
    drafter, found = engine.drafter, list[Check]()
    try:
        began = time.monotonic()
        task = bar.add_task(f"{name_of(drafter)}: start", total=None)
        try:
            await engine.arm.fleet.start()
            ran = await engine.arm.fleet.running()
        except Exception as error:
            return [failed_with(drafter.kind, "start", in_words(error))]
        finally:
            bar.remove_task(task)
        found.append(start_check(drafter.kind, time.monotonic() - began, ran))
        for name, check in engine.checks():
            task = bar.add_task(f"{name_of(drafter)}: {name}", total=None)
            try:
                found.append(await check())
            except Exception as error:
                found.append(failed_with(drafter.kind, name, in_words(error)))
            bar.remove_task(task)
        return found
    finally:
        await engine.arm.stop()


class CheckedEngine:
    def __init__(self, config: SelftestConfig, drafter: DrafterConfig, policy: Recomputation):
        self.config, self.drafter, self.policy = config, drafter, policy
        self.service = config.service(drafter)
        self.arm = EngineArm(self.service)
        self.contexts = Contexts(config.sampling(), policy, self.service.context_limit)
        given = config.acceptance_prompts()
        prompts = self.contexts.prompts if given is None else read_prompts(config.model, given)
        self.prompts = [prompt[-PROMPT_TOKENS:] for prompt in prompts]

    def checks(self) -> Iterator[tuple[str, Callable[[], Awaitable[Check]]]]:
        drafts, kind = self.drafter.drafts, make_drafter(self.drafter)
        yield "laws of sampler and verification", self.laws
        for cut in self.config.cuts():
            yield named(cut), lambda cut=cut: self.samples(cut)  # type: ignore[misc]
        if drafts and kind.samples:  # n-gram drafts are only as long as what they find
            yield "draft lengths", self.draft_lengths
        if "drafter" in self.arm.fleet.store.sets:
            yield "new drafter", self.new_drafter
        yield "new policy", self.new_policy

    async def laws(self) -> Check:
        deviations = await self.arm.fleet.controls.of_the_first("law_deviations", SCALE)
        return law_check(self.drafter.kind, deviations)

    async def samples(self, cut: Cut) -> Check:
        requests = self.contexts.requests(cut) if cut.temperature else self.contexts.greedy_requests(cut)
        row = self._judged(await self._generated(requests), self.policy, cut)
        return self._samples_check(named(cut), row)

    async def draft_lengths(self) -> Check:
        longest = self.drafter.draft_tokens
        prompts = [prompt[-TIMED_PROMPT:] for prompt in self.prompts]
        plan = self._plan(draft_lengths=list(range(longest + 1)), steps=STEPS, prompts=prompts)
        return lengths_check(self.drafter.kind, await self.arm.fleet.measure(plan), plan.batch_sizes[0], longest)

    async def new_drafter(self) -> Check:
        made = make_drafter(self.drafter)
        folder = made.checkpoint(self.arm.fleet.folder)
        assert folder is not None
        before = await self._accepted()
        with tempfile.TemporaryDirectory() as temporary:
            await self._push("drafter", noisy_copy(folder, Path(temporary) / "noise", made.owns, DRAFTER_NOISE))
        noise = await self._accepted()
        row = self._judged(await self._some_generated(), self.policy, Cut())
        await self._push("drafter", folder)
        after = await self._accepted()
        return new_drafter_check(self.drafter.kind, before, noise, after, self._samples_check("", row))

    async def new_policy(self) -> Check:
        with tempfile.TemporaryDirectory() as temporary:
            folder = noisy_copy(
                self.arm.fleet.folder, Path(temporary) / "noise", lambda name: not is_mtp(name), POLICY_NOISE
            )
            await self._push("policy", folder)
            groups = await self._some_generated()
            row = self._judged(groups, Recomputation(folder), Cut())
        responses = [Response(group.prompt_token_ids, c.token_ids) for group in groups for c in group.completions]
        old = join_scores(self.policy.scores(responses, Cut())).sampled_logprobs
        returned = torch.tensor([logprob for group in groups for c in group.completions for logprob in c.logprobs])
        to_old = (returned - old).abs().mean().item()
        return new_policy_check(self.drafter.kind, self._samples_check("", row), row.logprob_difference_mean, to_old)

    async def _push(self, of: WeightsOf, folder: Path) -> None:
        await self.arm.fleet.updates.push_folder(of, str(folder))

    async def _accepted(self) -> float:
        """Drafts that are accepted in a step."""
        plan = self._plan(
            draft_lengths=[self.drafter.draft_tokens], steps=1, responses=RESPONSES, response_tokens=RESPONSE_TOKENS
        )
        measured = await self.arm.fleet.measure(plan)
        return sum(measured.accepted) / max([1, *measured.drafted])

    def _plan(self, **more: object) -> Plan:
        batch = min(BATCH, self.service.engine.max_num_seqs)
        return Plan.model_validate({"prompts": self.prompts, "batch_sizes": [batch], **more})

    async def _generated(self, requests: list[GroupRequest]) -> list[Group]:
        at_once = max(1, self.service.engine.max_num_seqs // requests[0].n)
        return await generate_all(self.arm, requests, at_once, lambda: None)

    async def _some_generated(self) -> list[Group]:
        """A quarter of the usual samples, at temperature 1."""
        requests = self.contexts.requests(Cut())
        return await self._generated(requests[: max(1, len(requests) // 4)])

    def _judged(self, groups: list[Group], policy: Recomputation, cut: Cut) -> AuditRow:
        in_float32 = self.config.engine.dtype == "float32"
        level = Level(self.config.limit, self.config.tolerance.largest, in_float32)
        return judge(Setting(self.drafter, cut), groups, policy, level, self.service.context_limit)

    def _samples_check(self, name: str, row: AuditRow) -> Check:
        return samples_check(self.drafter.kind, name, row, self.config.tolerance, self.config.limit)


def named(cut: Cut) -> str:
    """Example: "temperature 0.7, top-p 0.9, top-k 20"."""
    parts = [f"temperature {cut.temperature:g}"]
    parts += [f"top-p {cut.top_p:g}"] if cut.top_p < 1.0 else []
    parts += [f"top-k {cut.top_k}"] if cut.top_k else []
    return ", ".join(parts)

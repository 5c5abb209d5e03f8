"""Checks of a self-test: what was measured, its limits, and the verdict.

Each function makes one row of the table out of measurements, and asks no engine.
"""

import math
from collections.abc import Mapping

import numpy as np
from pydantic import BaseModel

from rollout_service.engine.step_costs import Measured, StepKind
from rollout_service.evaluation.audit_row import AuditRow
from rollout_service.evaluation.goodness_of_fit import p_of_z
from rollout_service.evaluation.selftest_config import Tolerance
from rollout_service.vllm_plugin.law import LIMIT

LOST = 0.5
"""most of its accepted drafts that a drafter may keep when it becomes noise"""
TELLS = 0.2
"""accepted drafts a step from which a loss of them says that new weights are in use"""
FOLLOWED = 5.0
"""how many times as far the new samples must be from the policy before as from the new one"""


class Check(BaseModel):
    """A row of the table."""

    drafter: str
    check: str
    figures: str
    limits: str
    passed: bool


def failed_with(drafter: str, check: str, error: str) -> Check:
    return Check(drafter=drafter, check=check, figures=error, limits="no error", passed=False)


def start_check(drafter: str, seconds: float, ran: Mapping[str, str]) -> Check:
    """`ran`: how the engine samples and verifies drafts, as it says itself; empty without a drafter."""
    drafts = f"; drafts {ran['draft_sampling']}, verification {ran['verification']}" if ran else ""
    return Check(drafter=drafter, check="start", figures=f"{seconds:.0f} s{drafts}", limits="no error", passed=True)


def law_check(drafter: str, deviations: Mapping[str, float]) -> Check:
    """Whether tokens of known distributions follow their law (vllm_plugin/law.py)."""
    wrong = [f"{name} by {by:.1f}" for name, by in deviations.items() if not by < LIMIT]
    worst = max(deviations, key=lambda name: deviations[name])
    return Check(
        drafter=drafter,
        check="laws of sampler and verification",
        figures=(
            f"{len(deviations)} laws; {', '.join(wrong)} standard deviations"
            if wrong
            else f"{len(deviations)} laws; largest deviation {deviations[worst]:.1f}: {worst}"
        ),
        limits=f"< {LIMIT:g} standard deviations",
        passed=not wrong,
    )


def samples_check(drafter: str, name: str, row: AuditRow, tolerance: Tolerance, limit: float) -> Check:
    """Whether samples follow the policy, and their log-probabilities equal the recomputed ones (audit_row.py)."""
    differences = f"Δlogp mean {row.logprob_difference_mean:.0e}, max {row.logprob_difference_max:.0e}"
    if row.router_ties and row.router_ties.excused:
        differences += f", {row.router_ties.excused} excused by {row.router_ties.flips} router ties"
    within = f"Δlogp mean ≤ {tolerance.mean:.0e}"
    if math.isfinite(tolerance.largest):
        within += f", max ≤ {tolerance.largest:.0e}"
    failures = list(row.failures)
    if not row.logprob_difference_mean <= tolerance.mean and "log-probabilities" not in failures:  # nan fails as well
        failures.append("log-probabilities")
    if row.greedy is not None:
        equal = row.greedy.right
        figures, limits = f"{equal} of {row.greedy.compared} most likely", f"all; {within}"
    else:
        assert row.z is not None
        assert row.fit is not None
        worst = max(row.positions, key=lambda at: abs(row.positions[at].z))
        fit = min(row.fit.p_first, row.fit.p_both, row.fit.p_worst_context)
        figures = f"z {row.z:+.2f}, {worst} {row.positions[worst].z:+.2f}; first two p {fit:.2g}"
        limits = f"|z| < {limit:g}, p > {p_of_z(limit):.0e}; {within}"
    wrong = f"; wrong: {', '.join(failures)}" if failures else ""
    return Check(
        drafter=drafter,
        check=name,
        figures=f"{figures}; {differences}; {row.tokens} tokens{wrong}",
        limits=limits,
        passed=not failures,
    )


def lengths_check(drafter: str, measured: Measured, batch: int, draft_tokens: int) -> Check:
    """Whether steps have every draft length that was set."""
    times = {k: measured.seconds.get(StepKind(batch, k), []) for k in range(draft_tokens + 1)}
    shown = ", ".join(f"{k}: {1e3 * float(np.median(of)):.1f}" if of else f"{k}: never" for k, of in times.items())
    return Check(
        drafter=drafter,
        check="draft lengths",
        figures=f"ms of a step of {batch} responses, by draft length: {shown}",
        limits=f"each from 0 to {draft_tokens} is drafted when it is set",
        passed=all(times.values()),
    )


def new_drafter_check(drafter: str, before: float, noise: float, after: float, samples: Check) -> Check:
    """`before`, `noise`, `after`: drafts accepted at each step by the drafter of the checkpoint, by one that was made
    noise, and by that of the checkpoint again. `samples`: of the policy, while the drafter was noise."""
    most, least = LOST * before, (before + noise) / 2.0
    tells = before >= TELLS
    limits = f"noise ≤ {most:.2f}, again ≥ {least:.2f}" if tells else "too few accepted to tell: give other `prompts`"
    return Check(
        drafter=drafter,
        check="new drafter",
        figures=f"accepted {before:.2f}, as noise {noise:.2f}, pushed again {after:.2f}; as noise: {samples.figures}",
        limits=f"{limits}; {samples.limits}",
        passed=samples.passed and (not tells or (noise <= most and after >= least)),
    )


def new_policy_check(drafter: str, samples: Check, to_new: float, to_old: float) -> Check:
    """`samples` were judged by the new policy. `to_new`, `to_old`: mean differences of their log-probabilities to each
    policy's."""
    return Check(
        drafter=drafter,
        check="new policy",
        figures=f"{samples.figures}; to the policy before {to_old:.0e}",
        limits=f"{samples.limits}; to the policy before > {FOLLOWED:g} x mean",
        passed=samples.passed and to_old > FOLLOWED * to_new,
    )

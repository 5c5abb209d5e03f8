"""`rollout-service audit`: sample from the engine with every drafter and setting, test against the exact distributions.

for each drafter's engine:   for each of its rows:   several responses to each of the same contexts
recompute every token's distribution, test (audit_row.py), and report
"""

import asyncio
import sys
from collections.abc import Sequence
from typing import NamedTuple

import httpx
import ray
import torch
from rich.console import Console
from rich.progress import Progress

from drafters.devices import choose_device
from drafters.files.durable import check_folder
from drafters.registry import DrafterConfig
from drafters.runners import Runner
from drafters.scoring import join_scores
from rollout_service.client import RolloutError
from rollout_service.engine.hardware import resolve_device, runner_of
from rollout_service.engine.switches import started_as
from rollout_service.evaluation.arms import Arm, EndpointArm, EngineArm, fetch_models, name_of
from rollout_service.evaluation.audit_config import AuditConfig, AuditedDrafter, Setting
from rollout_service.evaluation.audit_report import write_report
from rollout_service.evaluation.audit_row import AuditRow, Level, judge
from rollout_service.evaluation.cut import Cut
from rollout_service.evaluation.exact_policy import Recomputation, Response
from rollout_service.evaluation.prompts import read_prompts
from rollout_service.evaluation.ran import Ran
from rollout_service.evaluation.running import generate_all, progress, report_console, started_engines
from rollout_service.fleet.member import FleetError
from rollout_service.fleet.resources import check_machine
from rollout_service.protocol import Group, GroupRequest, Sampling

COMPLETIONS = 8
"""completions of each request"""
CANDIDATES = 16
"""random prompts that are drawn for each one that is kept"""

Sampled = tuple[Setting, Ran, list[Group]]
Greedy = dict[tuple[int, ...], list[int]]


class Samples(NamedTuple):
    rows: list[Sampled]
    greedy: Greedy | None
    """the responses of greedy decoding without a drafter; None if no engine without a drafter ran"""
    context_limit: int
    dtype: str
    """of the engines"""


def audit(config: AuditConfig) -> list[AuditRow]:
    """Sample, test, print, and write audit.json and audit.md to `config.output`. Exits with 1 when a row or an engine
    fails."""
    console = report_console()
    try:
        check_folder(config.output, "output")
        choose_device(config.recomputation.device, "recomputation.device")
        device = resolve_device(config.engine.device)
        if config.endpoint is None:
            check_machine(config.service(DrafterConfig()), device, turns=1)
        drafters = [] if config.endpoint is not None else map(config.drafter_config, config.drafters)
        recomputation = Recomputation(fetch_models(config.model, drafters, device), config.recomputation)
        samples = asyncio.run(sample(config, recomputation, console))
    except httpx.HTTPError as error:
        sys.exit(f"rollout-service audit: endpoint: {config.endpoint}: {str(error) or type(error).__name__}")
    except (FleetError, RolloutError, ValueError, OSError) as error:
        sys.exit(f"rollout-service audit: {error}")
    except KeyboardInterrupt:
        sys.exit("rollout-service audit: interrupted; nothing was written")
    finally:
        ray.shutdown()
    in_float32 = samples.dtype == config.recomputation.dtype == "float32"
    level = Level(config.limit, config.logprob_tolerance, in_float32)
    rows = []
    with progress(console) as bar:
        task = bar.add_task("testing rows", total=len(samples.rows))
        for setting, ran, groups in samples.rows:
            rows.append(judge(setting, groups, recomputation, level, samples.context_limit, samples.greedy, ran))
            bar.advance(task)
    write_report(rows, config, console)
    if any(row.failures for row in rows):
        sys.exit(1)
    return rows


async def sample(config: AuditConfig, recomputation: Recomputation, console: Console) -> Samples:
    with progress(console) as bar:
        if config.endpoint is not None:
            token = config.token.get_secret_value() if config.token else None
            arm = await EndpointArm.connect(config.endpoint, token, config.ca_file)
            try:
                limit = (await arm.client.model())["max_model_len"]
                rows = config.rows_of(arm.drafter)
                contexts = Contexts(config, recomputation, limit)
                dtype = (await arm.client.weights()).dtype
                return Samples(await sample_rows(config, arm, rows, contexts, bar), None, limit, dtype)
            finally:
                await arm.stop()
        rows = config.rows()
        limit = config.context_limit
        contexts = Contexts(config, recomputation, limit)
        device = resolve_device(config.engine.device)
        runner = runner_of(device)
        drafters = list(dict.fromkeys(engine_key(row.drafter, runner) for row in rows))
        plain = engine_key(config.drafter_config(AuditedDrafter(kind="none")), runner)
        if any(row.cut.temperature == 0.0 for row in rows) and plain not in drafters:
            drafters.insert(0, plain)
        at_once = 1 if device == "cuda" else len(drafters)
        sampled: list[Sampled] = []
        greedy: Greedy | None = None
        for start in range(0, len(drafters), at_once):
            keys = drafters[start : start + at_once]
            arms = [EngineArm(config.service(DrafterConfig.model_validate_json(key))) for key in keys]
            async with started_engines(arms, bar):
                for key, engine in zip(keys, arms, strict=True):
                    of_engine = [row for row in rows if engine_key(row.drafter, runner) == key]
                    sampled += await sample_rows(config, engine, of_engine, contexts, bar)
                    if not engine.drafter.drafts:
                        requests = contexts.greedy_requests(Cut(temperature=0.0))
                        groups = await generate_all(engine, requests, config.engine.max_num_seqs, lambda: None)
                        greedy = {tuple(g.prompt_token_ids): g.completions[0].token_ids for g in groups}
        order = {id(row): index for index, row in enumerate(rows)}
        in_order = sorted(sampled, key=lambda pair: order[id(pair[0])])
        return Samples(in_order, greedy, limit, config.engine.dtype)


def engine_key(drafter: DrafterConfig, runner: Runner) -> str:
    """Rows with the same key share an engine."""
    return started_as(drafter, runner).model_dump_json()


async def sample_rows(
    config: AuditConfig, arm: Arm, rows: Sequence[Setting], contexts: "Contexts", bar: Progress
) -> list[Sampled]:
    sampled = []
    for row in rows:
        requests = contexts.greedy_requests(row.cut) if row.cut.temperature == 0.0 else contexts.requests(row.cut)
        task = bar.add_task(f"{name_of(row.drafter)}, temperature {row.cut.temperature:g}", total=len(requests))
        ran = await arm.draft_as(row.drafter)
        in_flight = max(1, config.engine.max_num_seqs // requests[0].n)
        groups = await generate_all(arm, requests, in_flight, lambda task=task: bar.advance(task))  # type: ignore[misc]
        sampled.append((row, ran, groups))
        bar.remove_task(task)
    return sampled


class Contexts:
    """The prompts: the configured ones or a few random tokens each, and long ones whose responses end at the limit.

    Of the random prompts, those are kept after which the policy is least sure, because a wrong temperature shows in the
    variance of the surprisal. The choice depends only on the policy, so it favours no outcome.
    """

    def __init__(self, config: AuditConfig, recomputation: Recomputation, limit: int):
        self.config, self.limit, self.recomputation = config, limit, recomputation
        self.vocabulary = recomputation.vocabulary
        self.generator = torch.Generator().manual_seed(config.seed)
        self.longest = limit - config.response_tokens
        if self.longest < 2:
            room = f"no room for a prompt in a context of {limit} tokens"
            raise ValueError(f"response_tokens: {config.response_tokens} leaves {room}; give at most {limit - 2}")
        long = -(-config.contexts // 8)
        short = config.contexts - long
        self.prompts = [
            *(self._configured()[:short] if config.prompts else self._unsure(self._random(CANDIDATES * short), short)),
            *self._unsure([self._tokens(self.longest) for _ in range(CANDIDATES * long)], long),
        ]
        self.greedy_prompts = self._random(-(-config.tokens // config.response_tokens)) + self.prompts
        self.requested = 0

    def _configured(self) -> list[list[int]]:
        assert self.config.prompts is not None
        prompts = read_prompts(str(self.recomputation.folder), self.config.prompts)
        return [prompt[-self.longest :] for prompt in prompts]

    def _random(self, count: int) -> list[list[int]]:
        """`count` different prompts, as short as possible, because the policy is less sure after a shorter prompt."""
        found: dict[tuple[int, ...], None] = {}
        length = 1
        while len(found) < count:
            if 2 * len(found) >= self.vocabulary**length:
                length += 1
            found.setdefault(tuple(self._tokens(length)))
        return [list(prompt) for prompt in found]

    def _unsure(self, candidates: list[list[int]], count: int) -> list[list[int]]:
        after = join_scores(self.recomputation.scores([Response(prompt, [0]) for prompt in candidates], Cut()))
        return [candidates[i] for i in after.variance.topk(count).indices.tolist()]

    def _tokens(self, length: int) -> list[int]:
        return torch.randint(self.vocabulary, (length,), generator=self.generator).tolist()

    def requests(self, cut: Cut) -> list[GroupRequest]:
        """Equally many responses to every context, COMPLETIONS in each request, all with different seeds."""
        config = self.config
        each = -(-config.tokens // (config.response_tokens * len(self.prompts) * COMPLETIONS))
        return [self._request(prompt, cut, COMPLETIONS) for _ in range(each) for prompt in self.prompts]

    def greedy_requests(self, cut: Cut) -> list[GroupRequest]:
        """One response to each prompt, with enough prompts for `tokens` tokens."""
        return [self._request(prompt, cut, 1) for prompt in self.greedy_prompts]

    def _request(self, prompt: list[int], cut: Cut, n: int) -> GroupRequest:
        self.requested += n
        sampling = Sampling(
            **cut._asdict(), max_tokens=self.config.response_tokens, ignore_eos=True,
            seed=(self.config.seed + self.requested) % 2**31,
        )  # fmt: skip
        return GroupRequest(prompt_token_ids=prompt, n=n, sampling=sampling, draft_steps=True)

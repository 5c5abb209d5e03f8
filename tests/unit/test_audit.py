"""The audit's parts: which rows it tests, how it places tokens, what its tests detect and what they do not."""

from itertools import combinations, product

import numpy as np
import pytest
import rl_toys as toys
import torch

from drafters.registry import DrafterConfig
from drafters.scoring import score_tokens
from rollout_service.evaluation.audit_config import AuditConfig, Setting, pairwise
from rollout_service.evaluation.audit_report import markdown
from rollout_service.evaluation.audit_row import Level, fit_first_two, judge, token_positions
from rollout_service.evaluation.cut import Cut
from rollout_service.evaluation.exact_policy import Recomputation, Response
from rollout_service.evaluation.goodness_of_fit import Fit, detectable_shift, g_test, holm, p_of_z
from rollout_service.evaluation.recomputation_config import RecomputationConfig
from rollout_service.protocol import Completion, Group, Sampling, Speculation

VOCAB = 12


class Bigrams(Recomputation):
    """A policy that sees only the last token: its logits are a table."""

    dtype = torch.float32

    def in_float64(self):
        return self

    def __init__(self):
        self.table = 1.5 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))

    def _logits(self, responses):
        for index, (prompt, tokens) in enumerate(responses):
            yield index, self.table[torch.tensor([prompt[-1], *tokens[:-1]])]

    def draw(self, prompts, length, temperature=1.0):
        """Tokens (len(prompts), length) and their log-probabilities."""
        last, tokens, logprobs = torch.tensor(prompts), [], []
        for _ in range(length):
            logp = (self.table[last] / temperature).log_softmax(1)
            last = torch.multinomial(logp.exp(), 1).squeeze(1)
            tokens.append(last)
            logprobs.append(logp.gather(1, last[:, None]).squeeze(1))
        return torch.stack(tokens, 1).tolist(), torch.stack(logprobs, 1).tolist()


def completion(tokens, logprobs, steps=None):
    speculation = steps and Speculation(
        drafter="mtp", drafter_version=0, draft_steps=len(steps), drafted=sum(d for d, _ in steps),
        accepted=sum(a for _, a in steps), accepted_histogram=[], steps=steps,
    )  # fmt: skip
    return Completion(
        index=0, text="", token_ids=tokens, logprobs=logprobs, weight_versions=[], finish_reason="length",
        speculation=speculation,
    )  # fmt: skip


def groups(policy, count, drawn_at=1.0, length=8):
    prompts = [i % 4 for i in range(count)]
    tokens, logprobs = policy.draw(prompts, length, drawn_at)
    return [
        Group(id="", prompt_token_ids=[p], completions=[completion(t, lp)], sampling=Sampling(), engine=0)
        for p, t, lp in zip(prompts, tokens, logprobs, strict=True)
    ]


def row(policy, drawn, cut=None, greedy=None):
    return judge(Setting(DrafterConfig(), cut or Cut()), drawn, policy, Level(), 1000, greedy)


def test_every_pair_of_values_occurs_in_the_rows():
    factors = [list("abcde"), [0.0, 0.7, 1.0, 1.2], [1.0, 0.9], [0, 20], ["standard", "block"]]
    rows = list(pairwise(*factors))
    assert len(rows) == 20  # fewer are impossible: two of the factors have 5 x 4 pairs
    for i, j in combinations(range(5), 2):
        assert {(r[i], r[j]) for r in rows} == set(product(factors[i], factors[j]))


def test_rows_of_a_configuration_cover_its_drafters_and_deterministic_ones_once():
    config = AuditConfig(model="m", drafters=[{"kind": "none"}, {"kind": "ngram"}, {"kind": "mtp", "draft_tokens": 5}])
    rows = config.rows()
    assert {r.drafter.kind for r in rows} == {"none", "ngram", "mtp"}
    assert {r.drafter.draft_sampling for r in rows if r.drafter.kind == "ngram"} == {"greedy"}
    assert {r.drafter.draft_tokens for r in rows if r.drafter.kind == "mtp"} == {5}
    assert config.context_limit == config.engine.max_model_len - 6
    assert len({(r.drafter.model_dump_json(), r.cut) for r in rows}) == len(rows)


@pytest.mark.parametrize(("field", "value"), [("top_p", [1.5]), ("temperature", [-1.0]), ("prompts", "nowhere")])
def test_a_wrong_grid_is_refused_by_field(field, value):
    with pytest.raises(ValueError, match=field):
        AuditConfig(model="m", **{field: value})


def test_tokens_are_placed_by_the_record_of_steps():
    c = completion(list(range(9)), [0.0] * 9, [(0, 0), (3, 1), (0, 0), (3, 3), (3, 2)])
    assert token_positions(c) == [
        "undrafted", "draft 1", "draft 2", "undrafted", "draft 1", "draft 2", "draft 3", "bonus", "draft 1",
    ]  # fmt: skip


def test_what_is_sampled_from_the_policy_passes():
    torch.manual_seed(0)
    policy = Bigrams()
    result = row(policy, groups(policy, 4000))
    assert result.failures == []
    assert result.tokens == 32_000
    assert "pass" in markdown([result])


def test_another_temperature_fails_by_surprisal_and_the_row_says_which_bias_it_can_detect():
    torch.manual_seed(0)
    policy = Bigrams()
    seen = row(policy, groups(policy, 4000)).detectable
    drawn = groups(policy, 4000, drawn_at=1.0 + 1.5 * seen.temperature)
    assert "surprisal" in row(policy, drawn).failures
    assert "surprisal" in markdown([row(policy, drawn)])


def test_returned_log_probabilities_that_differ_fail():
    torch.manual_seed(0)
    policy = Bigrams()
    drawn = groups(policy, 400)
    drawn[7].completions[0].logprobs[3] += 1e-3
    assert row(policy, drawn).failures == ["log-probabilities"]
    drawn[7].completions[0].logprobs[3] = float("nan")
    assert row(policy, drawn).failures == ["log-probabilities"]


class Rounded(Bigrams):
    """Its logits in float32 are not exact."""

    def __init__(self):
        super().__init__()
        self.exact = Bigrams()

    def in_float64(self):
        return self.exact


@pytest.mark.parametrize(("of_engine", "failures"), [(-9e-5, []), (-1.2e-4, ["log-probabilities"])])
def test_the_recomputations_own_rounding_is_not_held_against_the_engine(of_engine, failures):
    torch.manual_seed(0)
    policy = Rounded()
    drawn = groups(policy.exact, 400)
    some = drawn[7].completions[0]
    policy.table[some.token_ids[2], some.token_ids[3]] += 9e-5
    assert row(policy, drawn).logprobs_in_float64 == 0
    some.logprobs[3] += of_engine
    result = row(policy, drawn)
    assert result.logprobs_in_float64 == 1
    assert result.failures == failures
    assert ("pass, 1 in float64" in markdown([result])) == (not failures)


@pytest.mark.parametrize("cut", [Cut(1.0, 1.0, 3), Cut(1.0, 0.75, 0)])
def test_an_extra_token_in_the_cut_is_explained_only_if_it_lies_on_the_edge(cut):
    def failures(beyond_the_edge):
        """An engine keeps four tokens where the recomputation keeps three, and the fourth is tied with the third."""
        torch.manual_seed(0)
        policy = Bigrams()
        kept = torch.tensor([0.25, 0.25, 0.25 + beyond_the_edge, 0.25 - beyond_the_edge])
        policy.table = torch.full((VOCAB, VOCAB), -20.0)
        policy.table[:, :4] = kept.log()
        tokens = torch.randint(3, (40, 8)).tolist()
        logprobs = [kept.log()[line].tolist() for line in torch.tensor(tokens)]
        drawn = [
            Group(id="", prompt_token_ids=[0], completions=[completion(*c)], sampling=Sampling(), engine=0)
            for c in zip(tokens, logprobs, strict=True)
        ]
        result = row(policy, drawn, cut)
        assert (result.logprobs_on_the_edge > 0) == (not result.failures)
        return result.failures

    assert failures(1e-6) == []
    assert failures(1e-3) == ["log-probabilities"]


def test_a_bias_of_the_second_token_alone_fails_in_the_first_two():
    torch.manual_seed(0)
    policy = Bigrams()
    drawn = groups(policy, 4000)
    fair, _ = fit_first_two([Response(g.prompt_token_ids, g.completions[0].token_ids) for g in drawn], policy, Cut())
    for group in drawn[::10]:
        group.completions[0].token_ids[1] = 5
    biased, _ = fit_first_two([Response(g.prompt_token_ids, g.completions[0].token_ids) for g in drawn], policy, Cut())
    assert fair.p_both > 1e-3
    assert biased.p_both < 1e-5
    assert biased.p_first == pytest.approx(fair.p_first)


def test_greedy_responses_are_compared_with_the_baselines_or_with_the_policys_maximum():
    policy = Bigrams()
    tokens = []
    for _ in range(6):
        tokens.append(int(policy.table[tokens[-1] if tokens else 3].argmax()))
    _, logprobs = [], policy.table[torch.tensor([3, *tokens[:-1]])].log_softmax(1)
    returned = logprobs.gather(1, torch.tensor(tokens)[:, None]).squeeze(1).tolist()
    group = Group(
        id="", prompt_token_ids=[3], completions=[completion(tokens, returned)], sampling=Sampling(temperature=0.0),
        engine=0,
    )  # fmt: skip
    for expected in ({(3,): tokens}, None):
        result = row(policy, [group], Cut(0.0), expected)
        assert result.failures == []
        assert result.greedy.identical == 1
    other = [*tokens[:-1], (tokens[-1] + 1) % VOCAB]
    assert row(policy, [group], Cut(0.0), {(3,): other}).failures == ["differs from greedy decoding"]


def test_the_g_test_rejects_fair_counts_about_as_often_as_its_level_says():
    generator = np.random.default_rng(0)
    chances = generator.dirichlet(np.full(40, 0.3))
    p_values = [g_test(generator.multinomial(400, chances), chances).p for _ in range(2000)]
    assert 0.03 < np.mean(np.array(p_values) < 0.05) < 0.08
    assert g_test(np.array([5, 0]), np.array([1.0, 0.0])) == Fit(0.0, 0, 5)


def test_a_difference_called_detectable_is_usually_detected():
    generator = np.random.default_rng(0)
    chances = np.full(8, 1 / 8)
    variation = g_test(generator.multinomial(3000, chances), chances).detectable_variation(1e-3)
    biased = chances + np.repeat([variation, -variation], 4) / 4  # spread evenly, it is hardest to detect
    noticed = [g_test(generator.multinomial(3000, biased), chances).p < 1e-3 for _ in range(400)]
    assert 0.72 < np.mean(noticed) < 0.88


def test_levels_and_corrections():
    assert p_of_z(4.0) == pytest.approx(6.33e-5, rel=1e-2)
    assert holm([0.5, 0.01, 0.2]) == pytest.approx(0.03)
    assert holm([]) == 1.0
    assert detectable_shift(2.0, 4.0) == pytest.approx(2 * 4.8416, rel=1e-4)


def test_two_drafters_of_one_kind_have_separate_rows_in_the_order_of_the_configuration():
    heads = [{"kind": "eagle3", "model": model, "draft_tokens": k} for model, k in (("b", 3), ("a", 3), ("a", 5))]
    config = AuditConfig(model="m", drafters=heads, temperature=[0.0, 1.0], top_p=[1.0], top_k=[0])
    rows = [(row.drafter.model, row.drafter.draft_tokens) for row in config.rows()]
    assert list(dict.fromkeys(rows)) == [("b", 3), ("a", 3), ("a", 5)]
    assert rows == sorted(rows, key=[("b", 3), ("a", 3), ("a", 5)].index)


@pytest.mark.parametrize(
    ("model", "dtype", "tolerance"),
    [(toys.llama, "float32", 1e-5), (toys.llama, "bfloat16", 0.1), (toys.nemotron_h, "float32", 1e-5)],
)
@pytest.mark.parametrize("cut", [Cut(), Cut(0.7, 0.9, 12)])
def test_the_recomputation_is_that_of_the_whole_policy_in_its_dtype(model, cut, dtype, tolerance, tmp_path):
    policy = model()
    policy.save_pretrained(tmp_path)
    recomputation = Recomputation(tmp_path, RecomputationConfig(dtype=dtype))
    responses = [Response([1, 2, 3], [4, 5]), Response([6], [7, 8, 9, 10]), Response([2, 2], [3])]
    for response, scores in zip(responses, recomputation.scores(responses, cut), strict=True):
        ids, start = torch.tensor([[*response.prompt, *response.tokens]]), len(response.prompt) - 1
        logits = policy(input_ids=ids).logits[0, start:-1].detach()
        expected = score_tokens(logits, torch.tensor(response.tokens), **cut.arguments())
        torch.testing.assert_close(scores.logprobs, expected.logprobs, atol=tolerance, rtol=0.0)
        if dtype == "float32":  # in bfloat16 a token may be on the other side of the cut
            torch.testing.assert_close(scores.sampled_logprobs, expected.sampled_logprobs, atol=1e-5, rtol=1e-5)
    assert {p.dtype for p in recomputation.model.parameters()} == {getattr(torch, dtype)}
    assert recomputation.next_logits([[1, 2], [3]]).dtype == torch.float32

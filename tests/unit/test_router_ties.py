"""Ties of a policy's routers: an engine that chooses the other expert is excused, and nothing hides behind that."""

import copy
from types import SimpleNamespace

import pytest
import rl_toys as toys
import torch
from test_audit import completion
from tied_routers import with_margin
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHTopkRouter

from drafters.registry import DrafterConfig
from rollout_service.evaluation.audit_config import Setting
from rollout_service.evaluation.audit_report import INCOMPARABLE, markdown
from rollout_service.evaluation.audit_row import Level, compare_greedy, judge
from rollout_service.evaluation.cut import Cut
from rollout_service.evaluation.exact_policy import Recomputation, Response
from rollout_service.evaluation.router_margins import choosing_routers, recorded_margins
from rollout_service.evaluation.router_ties import FORWARDS, count_flips, count_ties
from rollout_service.protocol import Group, Sampling

PROMPTS = [[3, 1, 4], [1, 5], [9, 2, 6, 5], [8]]
TOKENS = 6
LAYER = 0
MARGIN = 4e-6
"""of the tie; the engine's margin is the same with the other sign"""


def mixture():
    return toys.qwen3_next(first_layer="full_attention", experts=8, active=2)


@torch.no_grad()
def drawn(model, each=100, temperature=1.0, prompts=PROMPTS):
    """Groups that the model samples at `temperature`, with its own log-probabilities at temperature 1."""
    generator, groups = torch.Generator().manual_seed(0), []
    for prompt in prompts:
        ids, logprobs = torch.tensor([prompt] * each), []
        for _ in range(TOKENS):
            logits = model(input_ids=ids).logits[:, -1]
            token = torch.multinomial((logits / temperature).softmax(1), 1, generator=generator)
            logprobs.append(logits.log_softmax(1).gather(1, token))
            ids = torch.cat([ids, token], 1)
        lines = zip(ids[:, len(prompt) :].tolist(), torch.cat(logprobs, 1).tolist(), strict=True)
        completions = [completion(*line) for line in lines]
        groups.append(Group(id="", prompt_token_ids=prompt, sampling=Sampling(), engine=0, completions=completions))
    return groups


class Tied:
    """A policy with a tie after `tokens`, and an engine that chooses the other expert there."""

    def __init__(self, folder, tokens=PROMPTS[0], margin=MARGIN):
        self.policy, pair = with_margin(mixture(), tokens, margin)
        self.engine, _ = with_margin(self.policy, tokens, -margin, pair)
        self.policy.save_pretrained(folder)
        self.recomputation = Recomputation(folder)

    def row(self, groups, **level):
        return judge(Setting(DrafterConfig(), Cut()), groups, self.recomputation, Level(**level), 1000)


@pytest.fixture
def tied(tmp_path):
    return Tied(tmp_path)


def test_an_engine_that_chooses_the_other_expert_at_a_tie_passes_and_its_excuses_are_counted(tied):
    groups = drawn(tied.engine)
    row = tied.row(groups)
    assert row.failures == []
    assert row.logprob_difference_max < 1e-4
    ties = row.router_ties
    assert (ties.flips, ties.ties) == (1, 1)
    after = sum(len(c.token_ids) for c in groups[0].completions)
    assert 0.5 * after < ties.excused <= ties.tokens_in_reach == after
    assert ties.largest_excused > 1e-3
    shown = markdown([row])
    assert f"pass, {ties.excused} excused" in shown
    assert f"| {ties.ties} | {ties.ties_expected:.2f} |" in shown


def test_an_engine_that_chooses_as_the_policy_does_needs_no_excuse(tied):
    row = tied.row(drawn(tied.policy))
    assert row.failures == []
    assert (row.router_ties.ties, row.router_ties.flips, row.router_ties.excused) == (1, 0, 0)


def test_the_other_expert_is_not_excused_where_there_is_no_tie(tmp_path):
    tied = Tied(tmp_path, margin=1e-4)
    row = tied.row(drawn(tied.engine))
    assert row.failures == ["log-probabilities"]
    assert (row.router_ties.ties, row.router_ties.near > 0, row.router_ties.excused) == (0, True, 0)


def test_a_tie_excuses_no_token_before_it(tmp_path):
    first = drawn(mixture())[0].completions[0].token_ids[0]
    tied = Tied(tmp_path, [*PROMPTS[0], first])
    groups = drawn(tied.engine)
    assert tied.row(groups).failures == []
    after = next(c for c in groups[0].completions if c.token_ids[0] == first)
    after.logprobs[0] += 1e-3
    assert tied.row(groups).failures == ["log-probabilities"]


def test_wrong_log_probabilities_after_a_tie_are_not_excused(tied):
    """Neither beside a right choice of experts nor beside the other one."""
    for model in (tied.policy, tied.engine):
        groups = drawn(model)
        groups[0].completions[0].logprobs[-1] += 1e-3
        assert tied.row(groups).failures == ["log-probabilities"]
        groups[0].completions[0].logprobs[-1] = float("nan")
        assert tied.row(groups).failures == ["log-probabilities"]


def test_a_wrong_sampler_is_not_excused_though_all_its_log_probabilities_are(tied):
    """Every response follows the tie. The engine draws at another temperature, and returns what it should."""
    of_engine = drawn(tied.engine, each=2000, prompts=PROMPTS[:1])
    assert tied.row(of_engine).failures == []
    row = tied.row(drawn(tied.engine, each=2000, temperature=1.2, prompts=PROMPTS[:1]))
    assert row.router_ties.excused > 0.5 * row.tokens
    assert "log-probabilities" not in row.failures
    assert "surprisal" in row.failures
    assert row.fit.draws == 0, "the context has two distributions"


@torch.no_grad()
def test_two_equal_experts_excuse_nothing_because_they_tie_too_often(tmp_path):
    policy, pair = with_margin(mixture(), PROMPTS[0], 0.0)
    router = policy.model.layers[LAYER].mlp.gate
    router.weight[pair[1]] = router.weight[pair[0]] + 1e-6 * router.weight[pair[0]].sign()
    engine = copy.deepcopy(policy)
    weight = engine.model.layers[LAYER].mlp.gate.weight
    weight[list(pair)] = weight[list(reversed(pair))]  # the same scores, for the other expert of each pair
    policy.save_pretrained(tmp_path)
    row = judge(Setting(DrafterConfig(), Cut()), drawn(engine), Recomputation(tmp_path), Level(), 1000)
    assert row.router_ties.ties > 10 * row.router_ties.ties_expected
    assert row.router_ties.excused == 0
    assert row.failures[:2] == ["log-probabilities", "too many router ties"]


def test_a_greedy_response_may_differ_after_a_tie_if_it_is_greedy_with_the_other_expert(tied):
    """The greedy response of an engine, where another engine has chosen the other expert."""

    def greedy(model):
        ids = list(PROMPTS[0])
        while len(ids) < len(PROMPTS[0]) + 40:
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        return Response(PROMPTS[0], ids[len(PROMPTS[0]) :])

    of_policy, of_engine = greedy(tied.policy), greedy(tied.engine)
    assert of_policy != of_engine
    _, margins = tied.recomputation.scores_and_margins([of_engine], Cut(0.0))
    expected, flips = {tuple(PROMPTS[0]): of_policy.tokens}, {0: frozenset({(LAYER, len(PROMPTS[0]) - 1)})}
    assert compare_greedy([of_engine], expected, tied.recomputation, margins, flips).after_router_ties == 1
    assert compare_greedy([of_engine], expected, tied.recomputation, margins).right == 0, "no flip was confirmed"
    assert compare_greedy([of_engine], expected, tied.recomputation).right == 0
    wrong = Response(PROMPTS[0], [*of_engine.tokens[:-1], (of_engine.tokens[-1] + 1) % toys.VOCAB_SIZE])
    assert compare_greedy([wrong], expected, tied.recomputation, margins, flips).right == 0


# --- 16 bits ---


def rounded(groups, by):
    """The groups with log-probabilities that are off by this much, up and down in turn."""
    for group in groups:
        for c in group.completions:
            c.logprobs = [logprob + by * (-1) ** i for i, logprob in enumerate(c.logprobs)]
    return groups


def test_in_16_bits_single_log_probabilities_of_a_routed_policy_are_not_tested_and_the_rest_is(tied):
    row = tied.row(rounded(drawn(tied.policy, each=400), 0.3), in_float32=False)
    assert row.failures == []
    assert (row.untested, row.router_ties) == (["log-probabilities"], None)
    assert "pass, log-probabilities untested" in markdown([row])
    assert INCOMPARABLE in markdown([row])
    hot = tied.row(drawn(tied.policy, each=400, temperature=1.3), in_float32=False)
    assert "surprisal" in hot.failures
    no_number = drawn(tied.policy)
    no_number[0].completions[0].logprobs[0] = float("-inf")
    assert tied.row(no_number, in_float32=False).failures == ["log-probabilities"]


def test_in_16_bits_log_probabilities_of_a_dense_policy_are_tested(tmp_path):
    toys.llama().save_pretrained(tmp_path)
    groups = rounded(drawn(toys.llama()), 0.3)
    row = judge(Setting(DrafterConfig(), Cut()), groups, Recomputation(tmp_path), Level(in_float32=False), 1000)
    assert (row.failures, row.untested) == (["log-probabilities"], [])


# --- margins ---


def test_margins_are_those_of_the_logits_that_transformers_returns(tied):
    responses = [Response([1, 2, 3], [4, 5]), Response([6], [7, 8, 9, 10]), Response([2, 2], [3])]
    scores, margins = tied.recomputation.scores_and_margins(responses, Cut())
    for response, score, margins_T in zip(responses, scores, margins, strict=True):
        ids = torch.tensor([[*response.prompt, *response.tokens[:-1]]])
        of_layers = tied.policy(input_ids=ids, output_router_logits=True).router_logits
        sorted_LTE = torch.stack(of_layers).sort(-1, descending=True).values
        torch.testing.assert_close(margins_T, (sorted_LTE[:, :, 1] - sorted_LTE[:, :, 2]).amin(0), atol=1e-5, rtol=0.0)
        (alone,) = tied.recomputation.scores([response], Cut())
        torch.testing.assert_close(score.logprobs, alone.logprobs, atol=1e-5, rtol=0.0)


def test_a_flip_gives_the_scores_of_a_policy_that_chooses_the_other_expert(tied):
    response = Response(PROMPTS[0], [5, 6, 7, 8])
    flip = (LAYER, len(PROMPTS[0]) - 1)
    scores, margins_LT = tied.recomputation.with_flips(response, Cut(), frozenset({flip}))
    ids = torch.tensor([[*response.prompt, *response.tokens]])
    logprobs_NV = tied.engine(input_ids=ids).logits[0, len(PROMPTS[0]) - 1 : -1].log_softmax(1)
    expected_N = logprobs_NV.gather(1, torch.tensor(response.tokens)[:, None]).squeeze(1)
    torch.testing.assert_close(scores.logprobs, expected_N, atol=1e-5, rtol=0.0)
    assert margins_LT.shape == (2, ids.shape[1] - 1)
    assert margins_LT[flip] == pytest.approx(MARGIN, abs=2e-6)
    (without,) = tied.recomputation.scores([response], Cut())
    assert (scores.logprobs - without.logprobs).abs().max() > 1e-3


@pytest.mark.parametrize("model", [toys.llama, toys.qwen3_next], ids=["dense", "all experts chosen"])
def test_a_policy_without_a_choice_has_no_margins_and_pays_nothing(model, tmp_path, monkeypatch):
    policy = model()
    assert choosing_routers(policy.get_decoder()) == []
    monkeypatch.setattr(Recomputation, "scores_and_margins", None)
    policy.save_pretrained(tmp_path)
    row = judge(Setting(DrafterConfig(), Cut()), drawn(policy), Recomputation(tmp_path), Level(), 1000)
    assert (row.failures, row.router_ties) == ([], None)
    assert "Ties" not in markdown([row])


def test_the_margin_of_a_router_with_a_correction_bias_is_in_the_scores_that_it_compares():
    router = NemotronHTopkRouter(
        SimpleNamespace(
            num_experts_per_tok=2, num_local_experts=4, hidden_size=4, routed_scaling_factor=1.0, n_group=1,
            topk_group=1, norm_topk_prob=True,
        )
    )  # fmt: skip
    router.weight.data = torch.eye(4)
    router.e_score_correction_bias.data = torch.tensor([0.0, 0.3, 0.0, 0.0])
    logits_NE = torch.tensor([[1.0, -0.5, 0.5, -3.0]])
    scores = (logits_NE.sigmoid() + router.e_score_correction_bias).squeeze(0)
    assert scores.topk(3).indices.tolist() == [0, 1, 2], "by its logit, expert 2 would be chosen"
    with recorded_margins([router], frozenset({(0, 0)})) as margins:
        _, _, experts_NK = router(logits_NE)
    assert margins[0].tolist() == pytest.approx([(scores[1] - scores[2]).item()])
    assert sorted(experts_NK[0].tolist()) == [0, 2]


# --- how many ties to expect ---


def sequences(count, length=64):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, (count, length), generator=generator).tolist()
    return [Response(line[:8], line[8:]) for line in ids]


def test_margins_of_a_constant_density_give_as_many_ties_as_expected():
    responses = sequences(2000)
    generator = torch.Generator().manual_seed(1)
    margins = [0.05 * torch.rand(63, generator=generator) for _ in responses]  # 2 in 10,000 are below 1e-5
    ties = count_ties(responses, margins)
    assert ties.ties_expected == pytest.approx(2000 * 63 * 2e-4, rel=0.1)
    assert ties.ties == pytest.approx(ties.ties_expected, abs=4 * ties.ties_expected**0.5)
    assert ties.tokens_in_reach == pytest.approx(ties.tokens_in_reach_expected, rel=0.8)
    assert ties.p > 1e-3


def test_too_many_ties_are_improbable():
    responses = sequences(200)
    margins = [torch.full((63,), 5e-4) for _ in responses]
    for tied in margins[:40]:
        tied[torch.arange(0, 63, 5)] = 0.0
    ties = count_ties(responses, margins)
    assert (ties.near, ties.ties) == (12581, 518), "19 sequences begin with the same token as another one"
    assert ties.p < 1e-12


def test_what_begins_with_the_same_tokens_is_one_position_and_one_flip():
    responses = [Response([1, 2], [3, 4, 5]), Response([1, 2], [3, 6, 7]), Response([2], [2, 3, 4])]
    margins = [torch.tensor([0.1, 1e-6, 0.1, 0.1])] * 2 + [torch.tensor([0.1, 0.1, 0.1])]
    flips = {0: frozenset({(0, 1)}), 1: frozenset({(0, 1)})}
    ties = count_ties(responses, margins)
    assert (ties.positions, ties.ties, count_flips(responses, flips)) == (3 + 2 + 3, 1, 1)
    assert ties.tokens_in_reach == 6


def test_the_search_for_flips_ends(tied, monkeypatch):
    """Where ties are many and none explains what the engine returned."""
    calls = []

    def with_flips(response, cut, flips):
        calls.append(flips)
        (scores,) = tied.recomputation.scores([response], cut)
        return scores, torch.zeros(2, len(response.prompt) + len(response.tokens) - 1)

    groups = drawn(tied.policy, each=30)
    groups[0].completions[0].logprobs[-1] += 1.0
    monkeypatch.setattr(tied.recomputation.in_float64(), "with_flips", with_flips)
    assert tied.row(groups).failures == ["log-probabilities"]
    assert len(calls) == len(set(calls)) == FORWARDS

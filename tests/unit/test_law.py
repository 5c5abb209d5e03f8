"""The self-test of an engine that starts: right functions pass it, and wrong ones are named."""

from types import SimpleNamespace

import pytest
import torch

from drafters.scoring import kept_tokens
from drafters.verification import Drafts, target_distribution, uniforms, verify
from rollout_service.vllm_plugin import verification as own
from rollout_service.vllm_plugin.face_v1 import FaceV1
from rollout_service.vllm_plugin.law import check_law, deviation
from rollout_service.vllm_plugin.table import apply_patches


class Right:
    """A face whose functions are this project's own."""

    device_type, draft_tokens, verifications = "cpu", 3, ("standard", "block")

    def sample(self, logits_NV, cut):
        if cut.temperature == 0.0:
            return logits_NV.argmax(1)
        scaled_NV = logits_NV / cut.temperature
        kept_NV = kept_tokens(scaled_NV, top_p=cut.top_p, top_k=cut.top_k)
        return torch.multinomial(scaled_NV.masked_fill(~kept_NV, -torch.inf).softmax(1), 1).squeeze(1)

    def verify(self, target_RKV, draft_KV, drafts_RK, temperature, verification):
        requests, drafts = drafts_RK.shape
        probs_NV = None if draft_KV is None else (draft_KV / temperature).softmax(1).repeat(requests, 1)
        bonus_R = torch.multinomial((target_RKV[:, -1] / temperature).softmax(1), 1).squeeze(1)
        return verify(
            target_distribution((target_RKV[:, :-1] / temperature).flatten(0, 1)),
            Drafts(drafts_RK.flatten(), torch.full((requests,), drafts), probs_NV),
            self.bonus(bonus_R, drafts_RK),
            uniforms(requests, {}),
            verification,
        )

    def bonus(self, bonus_R, drafts_RK):
        return bonus_R

    def check_products(self):
        pass


class Hotter(Right):
    def sample(self, logits_NV, cut):
        return super().sample(logits_NV, cut._replace(temperature=1.15 * cut.temperature))


class WithoutTopP(Right):
    def sample(self, logits_NV, cut):
        return super().sample(logits_NV, cut._replace(top_p=1.0))


class SecondBest(Right):
    def sample(self, logits_NV, cut):
        return super().sample(logits_NV, cut) if cut.temperature else logits_NV.topk(2, 1).indices[:, 1]


class AlwaysRefuses(Right):
    """Its tokens follow the target, and no draft is accepted."""

    def verify(self, target_RKV, draft_KV, drafts_RK, temperature, verification):
        tokens_RK = torch.full((len(drafts_RK), drafts_RK.shape[1] + 1), -1)
        tokens_RK[:, 0] = torch.multinomial((target_RKV[:, 0] / temperature).softmax(1), 1).squeeze(1)
        return tokens_RK


class AcceptsAll(Right):
    def verify(self, target_RKV, draft_KV, drafts_RK, temperature, verification):
        return torch.cat([drafts_RK, drafts_RK[:, :1]], 1)


class BonusIsTheLastDraft(Right):
    def bonus(self, bonus_R, drafts_RK):
        return drafts_RK[:, -1]


class StandardForBlock(Right):
    def verify(self, *arguments):
        return super().verify(*arguments[:-1], "standard")


class TemperatureTwice(Right):
    def verify(self, target_RKV, draft_KV, drafts_RK, temperature, verification):
        return super().verify(target_RKV / temperature, draft_KV, drafts_RK, temperature, verification)


WRONG = {
    Hotter: "sampling at temperature 0.6 by",
    WithoutTopP: "sampling at temperature 1, top-p 0.8 by",
    SecondBest: "sampling at temperature 0",
    AlwaysRefuses: "standard verification of sampled drafts",
    AcceptsAll: "standard verification of deterministic drafts",
    BonusIsTheLastDraft: "block verification of sampled drafts",
    StandardForBlock: "block verification of sampled drafts",
    TemperatureTwice: "standard verification of sampled drafts",
}


def test_right_functions_pass_and_the_engines_own_random_numbers_stay_as_they_were():
    torch.manual_seed(7)
    expected = torch.rand(4)
    torch.manual_seed(7)
    check_law(Right())
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("draft_tokens", [0, 1, 2])
def test_fewer_drafts_than_are_tested_and_none_pass(draft_tokens):
    face = Right()
    face.draft_tokens = draft_tokens
    check_law(face)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_a_wrong_function_is_named(wrong):
    with pytest.raises(RuntimeError) as error:
        check_law(wrong())
    assert WRONG[wrong] in str(error.value)


@pytest.fixture
def cpu(monkeypatch):
    """The face of an engine on a CPU, over vLLM's own sampler and verification as the plugin leaves them."""
    from vllm.v1.sample.sampler import Sampler

    apply_patches()
    monkeypatch.setattr(own.rejection_sampler(), "rejection_sample", own.rejection_sampler().rejection_sample)
    speculation = SimpleNamespace(num_speculative_tokens=3)
    return FaceV1(
        SimpleNamespace(
            model_runner=SimpleNamespace(sampler=Sampler("processed_logprobs"), drafter=SimpleNamespace()),
            vllm_config=SimpleNamespace(speculative_config=speculation),
        )
    )


@pytest.mark.parametrize("asked", ["auto", "standard", "block"])
def test_vllms_functions_on_a_cpu_follow_their_law_and_the_face_says_which_ran(cpu, asked):
    cpu.set_verification(asked)
    runs = cpu.running()["verification"]
    assert runs == {"standard": "standard (own)", "block": "block (own)"}.get(asked, runs)
    assert runs in ("standard (own)", "block (own)", "standard (vLLM)")
    check_law(cpu)


def test_a_fault_in_vllms_own_verification_ends_the_start(cpu, monkeypatch):
    stock = own.rejection_sampler().rejection_sample

    def accepts_too_much(drafts, lengths, longest, ends, probs, logits, *more, **keywords):
        return stock(drafts, lengths, longest, ends, probs, 1.3 * logits, *more, **keywords)

    monkeypatch.setattr(own.rejection_sampler(), "rejection_sample", accepts_too_much)
    with pytest.raises(RuntimeError, match="deviate from their law"):
        check_law(cpu)


def test_right_samples_deviate_as_a_normal_distribution_does_also_of_few_tokens():
    """Chi-square of few degrees of freedom is skewed: its own standard deviations would be exceeded too often."""
    torch.manual_seed(3)
    probs_V = torch.tensor([0.4, 0.3, 0.2, 0.1])
    found = torch.tensor([deviation(torch.multinomial(probs_V, 2000, True), probs_V.double()) for _ in range(4000)])
    assert abs(found.mean().item()) < 0.1
    assert 0.9 < found.std().item() < 1.1
    assert found.max().item() < 4.2  # chi-square's own standard deviations: some 7

"""Verification is lossless: its distribution, enumerated over all drafts, is the target's; the sampler follows it."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafters import verification
from drafters.verification import (
    Drafts,
    inverse_cdf,
    residual,
    survival,
    target_distribution,
    uniforms,
    verify,
)

METHODS = ("standard", "block")


class Tree:
    """Conditional distributions of a next token given every prefix of up to `depth` tokens: [V] float64 by prefix."""

    def __init__(self, vocab, depth, make):
        self.vocab, self.depth = vocab, depth
        self.of = {x: make(x) for n in range(depth + 1) for x in itertools.product(range(vocab), repeat=n)}

    def probability(self, tokens, given=()):
        chance = 1.0
        for i, token in enumerate(tokens):
            chance *= self.of[(*given, *tokens[:i])][token].item()
        return chance


def random_tree(vocab, depth, seed, sharpness=2.0):
    generator = torch.Generator().manual_seed(seed)

    def make(_):
        return (sharpness * torch.randn(vocab, generator=generator, dtype=torch.float64)).softmax(0)

    return Tree(vocab, depth, make)


def changed(tree, change):
    def make(prefix):
        weights = change(tree.of[prefix].clone(), prefix)
        return weights / weights.sum()

    return Tree(tree.vocab, tree.depth, make)


def zeros(weights, prefix):
    weights[(sum(prefix) + len(prefix)) % len(weights)] = 0.0
    return weights


def one_hot(weights, prefix):
    return torch.zeros_like(weights).scatter(0, weights.argmax(), 1.0)


def only(*tokens):
    def change(weights, prefix):
        return torch.zeros_like(weights).index_fill(0, torch.tensor(tokens), 1.0) * weights

    return change


def cut_to_top_k(weights, prefix):
    return weights.masked_fill(weights < weights.topk(2).values[-1], 0.0)


def cut_to_top_p(weights, prefix):
    ordered, order = weights.sort(descending=True)
    kept = ordered.cumsum(0) - ordered < 0.7 * weights.sum()
    return torch.zeros_like(weights).scatter(0, order, ordered * kept)


def pairs(vocab, depth):
    """Pairs of target and drafter, named by what is special about them."""
    p, q = random_tree(vocab, depth, 1), random_tree(vocab, depth, 2)
    return {
        "random": (p, q),
        "sharp": (random_tree(vocab, depth, 3, 8.0), random_tree(vocab, depth, 4, 8.0)),
        "identical": (p, p),
        "zeros in the target": (changed(p, zeros), q),
        "zeros in the drafter": (p, changed(q, zeros)),
        "disjoint supports": (changed(p, only(0)), changed(q, only(1, 2))),
        "one-hot target": (changed(p, one_hot), q),
        "one-hot drafter": (p, changed(q, one_hot)),
        "one-hot both": (changed(p, one_hot), changed(q, one_hot)),
        "same one-hot": (changed(p, one_hot), changed(p, one_hot)),
        "top-k cut": (changed(p, cut_to_top_k), q),
        "top-p cut": (changed(p, cut_to_top_p), q),
    }


def law(target, draft, k, method, deterministic=False):
    """The exact distribution of the first k + 1 tokens if plain sampling follows one verification. It is computed from
    `survival` and `residual`, the two functions that `verify` draws by."""
    drafted = [x for x in itertools.product(range(target.vocab), repeat=k) if draft.probability(x) > 0.0]
    rows = [(x[:i], x[i]) for x in drafted for i in range(k)]
    target_NV = torch.stack([target.of[prefix] for prefix, _ in rows])
    drafts = Drafts(
        torch.tensor([token for _, token in rows]),
        torch.full((len(drafted),), k),
        None if deterministic else torch.stack([draft.of[prefix] for prefix, _ in rows]),
    )
    survival_RK, weights_RK = survival(target_NV, drafts, method)
    at_least = torch.nn.functional.pad(torch.nn.functional.pad(survival_RK, (1, 0), value=1.0), (0, 1))
    exactly_RK1 = at_least[:, :-1] - at_least[:, 1:]
    residual_NV = residual(target_NV, drafts, torch.arange(len(rows)), weights_RK.flatten())
    residual_NV = residual_NV / residual_NV.sum(1, keepdim=True)
    found = dict.fromkeys(itertools.product(range(target.vocab), repeat=k + 1), 0.0)
    for r, x in enumerate(drafted):
        for n in range(k + 1):
            chance = draft.probability(x) * exactly_RK1[r, n].item()
            next_token = target.of[x] if n == k else residual_NV[r * k + n]
            for token, rest in itertools.product(
                range(target.vocab), itertools.product(range(target.vocab), repeat=k - n)
            ):
                start = (*x[:n], token)
                found[(*start, *rest)] += chance * next_token[token].item() * target.probability(rest, start)
    return found, (exactly_RK1 * torch.arange(k + 1)).sum(1), torch.tensor([draft.probability(x) for x in drafted])


def worst_error(target, found):
    return max(abs(chance - target.probability(tokens)) for tokens, chance in found.items())


CASES = [(name, k) for name in pairs(3, 0) for k in (1, 2, 3)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "k"), CASES)
def test_the_distribution_over_whole_sequences_is_the_targets(name, k, method):
    target, draft = pairs(3, k)[name]
    found, _, _ = law(target, draft, k, method)
    assert worst_error(target, found) < 1e-9


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_deterministic_drafts_equal_one_hot_distributions(k, method):
    target, draft = pairs(4, k)["one-hot drafter"]
    found, accepted, _ = law(target, draft, k, method, deterministic=True)
    assert worst_error(target, found) < 1e-9
    assert torch.allclose(accepted, law(target, draft, k, method)[1])


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("name", ["random", "sharp", "zeros in the target", "zeros in the drafter", "top-k cut"])
def test_block_verification_accepts_at_least_as_much(name, k):
    target, draft = pairs(3, k)[name]
    (_, standard, chance), (_, block, _) = law(target, draft, k, "standard"), law(target, draft, k, "block")
    gain = ((block - standard) * chance).sum().item()
    assert gain >= -1e-12
    if k > 1 and name == "random":
        assert gain > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_the_enumeration_detects_a_residual_drawn_from_the_target(method, monkeypatch):
    monkeypatch.setitem(globals(), "residual", lambda target_NV, drafts, rows, weights: target_NV[rows])
    target, draft = pairs(3, 2)["random"]
    assert worst_error(target, law(target, draft, 2, method)[0]) > 1e-3


def test_the_enumeration_detects_block_acceptance_with_the_standard_residual(monkeypatch):
    stock = residual
    monkeypatch.setitem(globals(), "residual", lambda p, d, rows, weights: stock(p, d, rows, torch.ones_like(weights)))
    target, draft = pairs(3, 2)["random"]
    assert worst_error(target, law(target, draft, 2, "block")[0]) > 1e-3


def pearson(drawn, probabilities):
    expected = len(drawn) * probabilities
    observed = torch.bincount(drawn, minlength=len(expected))
    assert not observed[expected == 0.0].any()
    return ((observed - expected) ** 2 / expected)[expected > 0.0].sum().item()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["random", "top-k cut", "one-hot drafter"])
def test_the_sampler_follows_the_law(name, method):
    """Half a million verifications of one draft distribution in one batch: Pearson's chi-square over all outcomes."""
    torch.manual_seed(0)
    count, k = 500_000, 2
    target, draft = pairs(3, k)[name]
    first = torch.multinomial(draft.of[()], count, replacement=True)
    second_given = torch.stack([draft.of[(a,)] for a in range(3)])
    second = torch.multinomial(second_given[first], 1).squeeze(1)
    target_NV = torch.stack(
        [target.of[()].expand(count, 3), torch.stack([target.of[(a,)] for a in range(3)])[first]], 1
    )
    draft_NV = torch.stack([draft.of[()].expand(count, 3), second_given[first]], 1)
    after = torch.stack([target.of[x] for x in itertools.product(range(3), repeat=2)])
    bonus = torch.multinomial(after[first * 3 + second], 1).squeeze(1)
    drafts = Drafts(torch.stack([first, second], 1).flatten(), torch.full((count,), k), draft_NV.flatten(0, 1))
    tokens = verify(target_NV.flatten(0, 1), drafts, bonus, uniforms(count, {}), method)
    # The first token follows the target; so does the second one, if the first was an accepted draft.
    chi_square = pearson(tokens[:, 0], target.of[()])
    chi_square += sum(pearson(tokens[(tokens[:, 0] == a) & (tokens[:, 1] >= 0), 1], target.of[(a,)]) for a in range(3))
    assert chi_square < 30.0  # at most 8 degrees of freedom: 1 in 5,000


# --- shapes and edges ---


@st.composite
def batches(draw):
    lengths = draw(st.lists(st.integers(0, 4), min_size=1, max_size=6))
    vocab = draw(st.integers(1, 9))
    scale = draw(st.sampled_from([0.0, 1.0, 50.0, 1e4]))
    seed = draw(st.integers(0, 2**16))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    return lengths, vocab, scale, seed, dtype, draw(st.booleans()), draw(st.booleans()), draw(st.booleans())


@settings(max_examples=300, deadline=None)
@given(batches(), st.sampled_from(METHODS))
def test_any_batch_gives_accepted_drafts_and_one_token_that_the_target_allows(batch, method):
    lengths, vocab, scale, seed, dtype, with_probs, cut, outside = batch
    torch.manual_seed(seed)
    count = sum(lengths)
    logits = (scale * torch.randn(count, vocab)).to(dtype)
    if cut and vocab > 1:
        logits = logits.masked_fill(logits < logits.amax(1, keepdim=True), -torch.inf)
    draft_probs = torch.randn(count, vocab).softmax(1) if with_probs else None
    drafted = torch.randint(vocab, (count,)) if draft_probs is None else torch.multinomial(draft_probs, 1).squeeze(1)
    if outside and count:
        drafted[torch.randint(count, (1,))] = int(torch.randint(2, (1,))) * (vocab + 1) - 1  # -1, or the vocabulary
    target = target_distribution(logits, torch.rand(count) < 0.3)
    bonus = torch.randint(vocab, (len(lengths),))
    drafts = Drafts(drafted, torch.tensor(lengths), draft_probs)
    tokens = verify(target, drafts, bonus, uniforms(len(lengths), {}), method)
    assert tokens.shape == (len(lengths), max(lengths) + 1)
    start = 0
    for r, length in enumerate(lengths):
        gained = tokens[r][tokens[r] >= 0].tolist()
        accepted = len(gained) - 1
        assert tokens[r].tolist() == gained + [-1] * (max(lengths) - accepted)
        assert 0 <= accepted <= length
        assert gained[:-1] == drafted[start : start + accepted].tolist()
        if accepted == length:
            assert gained[-1] == bonus[r]
        else:
            assert target[start + accepted, gained[-1]] > 0.0
        for i, token in enumerate(gained[:-1]):
            assert target[start + i, token] > 0.0
        start += length


@pytest.mark.parametrize("method", METHODS)
def test_equal_distributions_accept_everything(method):
    torch.manual_seed(0)
    probs = torch.randn(300, 50).softmax(1)
    drafts = Drafts(torch.multinomial(probs, 1).squeeze(1), torch.full((100,), 3), probs)
    tokens = verify(probs, drafts, torch.zeros(100, dtype=torch.long), uniforms(100, {}), method)
    assert (tokens >= 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_disjoint_distributions_accept_nothing(method):
    target = torch.tensor([[0.5, 0.5, 0.0]]).expand(30, 3).contiguous()
    drafts = Drafts(torch.full((30,), 2), torch.full((10,), 3), torch.tensor([[0.0, 0.0, 1.0]]).repeat(30, 1))
    tokens = verify(target, drafts, torch.zeros(10, dtype=torch.long), uniforms(10, {}), method)
    assert (tokens[:, 1:] == -1).all()
    assert (tokens[:, 0] < 2).all()


@pytest.mark.parametrize("method", METHODS)
def test_temperature_0_takes_the_maximum_beside_rows_that_are_sampled(method):
    torch.manual_seed(0)
    logits = torch.randn(400, 12)
    greedy = torch.arange(400) < 200
    draft_probs = torch.randn(400, 12).softmax(1)
    drafted = torch.where(torch.rand(400) < 0.5, logits.argmax(1), torch.multinomial(draft_probs, 1).squeeze(1))
    drafts = Drafts(drafted, torch.full((200,), 2), draft_probs)
    bonus = torch.zeros(200, dtype=torch.long)
    tokens = verify(target_distribution(logits, greedy), drafts, bonus, uniforms(200, {}), method)
    best = logits.argmax(1).view(200, 2)
    for r in range(100):
        expected = [best[r, 0].item()]
        if drafted[2 * r] == best[r, 0]:
            expected.append(best[r, 1].item())
            if drafted[2 * r + 1] == best[r, 1]:
                expected.append(0)
        assert tokens[r][tokens[r] >= 0].tolist() == expected
    assert (tokens[100:, 0] != best[100:, 0]).any()


def test_a_request_with_its_own_generator_gives_the_same_tokens_in_any_batch():
    torch.manual_seed(0)
    logits, probs = torch.randn(3, 40), torch.randn(3, 40).softmax(1)
    drafted, bonus = torch.multinomial(probs, 1).squeeze(1), torch.tensor([7])
    alone = Drafts(drafted, torch.tensor([3]), probs)
    expected = verify(target_distribution(logits), alone, bonus, uniforms(1, {0: torch.Generator().manual_seed(5)}))
    other = torch.randn(2, 40)
    batch = Drafts(
        torch.cat([torch.tensor([1, 2]), drafted]), torch.tensor([2, 3]), torch.cat([other.softmax(1), probs])
    )
    drawn = uniforms(2, {1: torch.Generator().manual_seed(5)})
    tokens = verify(target_distribution(torch.cat([other, logits])), batch, torch.tensor([0, 7]), drawn)
    assert tokens[1].tolist() == expected[0].tolist()


def test_a_weight_of_zero_is_never_drawn():
    weights = torch.tensor([[0.0, 1e-30, 0.0, 1.0, 0.0]]).expand(4, 5)
    uniform = torch.tensor([0.0, 0.5, 1.0 - 2**-53, 1e-31], dtype=torch.float64)
    assert set(inverse_cdf(weights, uniform).tolist()) <= {1, 3}


def test_there_is_no_loop_over_tokens_or_vocabulary():
    """The only loop is over requests with their own generators."""
    import ast
    import inspect

    loops = [n for n in ast.walk(ast.parse(inspect.getsource(verification))) if isinstance(n, ast.For | ast.While)]
    assert [ast.unparse(loop.iter) for loop in loops if isinstance(loop, ast.For)] == ["generators.items()"]
    assert len(loops) == 1

"""The learner's memory: what is stated before the start is what it takes, and what cannot fit is refused."""

from types import SimpleNamespace

import pytest
import rl_toys as toys
import torch
from allocations import Shapes, bytes_left
from rich.console import Console
from test_chunked_scoring import SMALL
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextForCausalLM,
)

import rl_loop.preflight
from drafters.attention import attend, lacks_grouped_kernel
from drafters.expert_routing import find_routers, reading_routers
from rl_loop.batching import Rollout
from rl_loop.learner.gradient_checkpointing import recompute_layers
from rl_loop.learner.local_learner import LocalLearner, compute_dtype, load_policy
from rl_loop.learner.memory import DeviceMemory, _channels, activation_bytes, device_memory, memory_needs
from rl_loop.learner.packed_attention import packed_attention
from rl_loop.learner.packing import packed_batches
from rl_loop.learner.padding import padded_batches
from rl_loop.learner.policy_learner import Example
from rl_loop.preflight import PreflightError, check_memory

CPU, GPU = torch.device("cpu"), torch.device("cuda")
GIB = 1 << 30
WIDTH = 128
WIDE = SMALL | {"hidden_size": WIDTH, "intermediate_size": 384, "num_hidden_layers": 3, "head_dim": 32}
POLICIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**WIDE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**WIDE)),
    "experts": lambda: MixtralForCausalLM(MixtralConfig(**WIDE, num_local_experts=4, num_experts_per_tok=2)),
    "experts and a shared one": lambda: Qwen3NextForCausalLM(
        toys.Qwen3NextConfig(
            **WIDE,
            layer_types=["full_attention"] * 3,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=128,
            shared_expert_intermediate_size=128,
        )
    ),
}


def drawn(lengths: list[tuple[int, int]]) -> list[Rollout]:
    torch.manual_seed(1)
    draw = lambda n: torch.randint(toys.VOCAB_SIZE, (n,)).tolist()  # noqa: E731
    return [Rollout(draw(prompt), draw(response), [0.0] * response) for prompt, response in lengths]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bfloat16 weights"])
@pytest.mark.parametrize("of", POLICIES)
def test_activations_are_estimated_from_the_shapes(of, dtype, checkpointing):
    policy = POLICIES[of]().eval()
    policy = policy.bfloat16() if dtype == "bfloat16 weights" else policy
    if checkpointing:
        recompute_layers(policy)
    (batch,) = packed_batches(drawn([(100, 156)] * 4), 10_000)

    def forward():
        with packed_attention(policy), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            return batch.hidden(policy)

    kept = bytes_left(forward)
    if dtype == "bfloat16" and not checkpointing:
        kept -= 2 * sum(parameter.numel() for parameter in policy.get_decoder().parameters())  # copies of the weights
    numbers = {"float32": (4, 4), "bfloat16": (2, 4), "bfloat16 weights": (2, 2)}[dtype]
    of_one_layer = activation_bytes(policy, *numbers, True) - (WIDE["num_hidden_layers"] * numbers[1] + 3 * 4) * WIDTH
    stated = activation_bytes(policy, *numbers, checkpointing) - of_one_layer
    assert 0.7 < kept / len(batch.tokens_S) / stated < 1.4


@pytest.mark.parametrize("weights_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kl_coefficient", [0.0, 0.5])
def test_weights_gradients_and_optimiser_take_what_is_stated(weights_dtype, kl_coefficient, tmp_path):
    toys.llama(tied=True).save_pretrained(tmp_path)
    settings = toys.config(tmp_path, weights_dtype=weights_dtype, kl_coefficient=kl_coefficient)
    dtype = getattr(torch, weights_dtype)
    reference = load_policy(tmp_path, dtype) if kl_coefficient else None
    learner = LocalLearner(settings, load_policy(tmp_path, dtype), reference)
    rollouts = drawn([(3, 5), (7, 2)])
    old, references = [s.logprobs for s in learner.logprobs(rollouts)], learner.reference_logprobs(rollouts)
    learner.train([Example(*row) for row in zip(rollouts, [1.0, -1.0], old, references, strict=True)], step=0)
    needs, parameters = memory_needs(settings, tmp_path, CPU, longest=9), list(learner.policy.parameters())
    models = [learner.policy] if learner.reference is None else [learner.policy, learner.reference]
    assert needs.weights == sum(p.nbytes for model in models for p in model.parameters())
    gradients = [parameter.grad.nbytes for parameter in parameters]
    assert needs.gradients == sum(gradients) + max(gradients)
    states = learner.optimiser.state.values()
    assert needs.optimiser == sum(state[key].nbytes for state in states for key in ("exp_avg", "exp_avg_sq"))
    assert {parameter.grad.dtype for parameter in parameters} == {dtype}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_load_balancing_loss_keeps_what_is_stated(checkpointing, tmp_path):
    policy = toys.qwen3_next(first_layer="full_attention", experts=64, active=4)
    policy.save_pretrained(tmp_path)
    if checkpointing:
        recompute_layers(policy)
    (batch,) = packed_batches(drawn([(1, 256)] * 4), 10_000)  # almost all tokens count
    frequencies_LE = torch.ones(2, 64)

    def forward(routers):
        with packed_attention(policy), reading_routers(routers) as read:
            hidden_ND = batch.hidden(policy)
        return hidden_ND, read, read.loss(batch.predicts_N, frequencies_LE, tokens=1) if routers else None

    kept = bytes_left(lambda: forward(find_routers(policy))) - bytes_left(lambda: forward([]))
    needs = lambda coefficient: memory_needs(  # noqa: E731
        toys.config(tmp_path, router_coefficient=coefficient, gradient_checkpointing=checkpointing), tmp_path, CPU, 100
    )
    stated = (needs(0.1).activations - needs(0.0).activations) / (3 * 4 * 100)
    assert stated == 2 * 4 * 2 * 64
    assert (0.4 if not checkpointing else 0.8) < kept / len(batch.tokens_S) / stated < 1.3


def test_a_convolution_of_a_recurrent_layer_keeps_its_channels_and_is_no_expert():
    assert list(_channels(torch.nn.Conv1d(64, 64, kernel_size=4, groups=64), experts=10)) == [128]


def test_a_small_step_needs_activations_for_its_own_tokens_only(tmp_path):
    toys.llama().save_pretrained(tmp_path)
    needs = lambda longest, **changes: memory_needs(toys.config(tmp_path, **changes), tmp_path, CPU, longest)  # noqa: E731
    of_step, of_budget = needs(10), needs(10, max_tokens_per_microbatch=30)
    assert of_step.activations == 4 * of_budget.activations  # 3 prompts of 4 completions of 10 tokens
    assert (
        needs(50, max_tokens_per_microbatch=30).activations == 5 * needs(10, max_tokens_per_microbatch=10).activations
    )
    assert needs(10, gradient_checkpointing=True).activations < of_step.activations
    assert needs(10, mode="async").versions_to_push == needs(10).weights > needs(10).versions_to_push == 0


def test_no_weight_is_loaded_to_know_what_a_run_needs(tmp_path):
    """Qwen3-8B by its configuration alone, and the 16 bytes for each of its 8.19 billion parameters."""
    qwen = Qwen3Config(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    qwen.save_pretrained(tmp_path)
    settings = toys.config(tmp_path, device="cuda", prompts_per_step=64, completions=8, gradient_checkpointing=True)
    needs = memory_needs(settings, tmp_path, GPU, longest=4096)
    assert needs.weights == needs.optimiser / 2 == 4 * 8_190_735_360
    assert 2 * 8_190_735_360 < needs.activations < 2 * 8_190_735_360 + 24 * GIB, "copies in bfloat16, and 16,384 tokens"
    assert needs.logits == 1.5 * (256 << 20)
    halved = memory_needs(settings.model_copy(update={"weights_dtype": "bfloat16"}), tmp_path, GPU, longest=4096)
    assert halved.weights == halved.optimiser / 2 == needs.weights / 2
    assert needs.total > 140 * GIB > 80 * GIB > halved.total - halved.gradients > 0


def said(settings, memory, monkeypatch, longest=10) -> str:
    monkeypatch.setattr(rl_loop.preflight, "device_memory", lambda device: memory)
    monkeypatch.setattr(rl_loop.preflight, "choose_device", lambda name: torch.device(name))
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    try:
        check_memory(settings, longest, console)
    except PreflightError as error:
        return f"{console.export_text()}\nrefused: {error}"
    return console.export_text()


def test_the_memory_of_a_run_is_stated_and_what_cannot_fit_is_refused(tmp_path, monkeypatch):
    toys.llama().save_pretrained(tmp_path)
    settings = toys.config(tmp_path, model=str(tmp_path))
    needs = memory_needs(settings, tmp_path, CPU, 10).total
    fits = said(settings, DeviceMemory(needs, GIB), monkeypatch)
    for row in ("weights", "gradients", "optimiser", "versions to push", "activations", "logits", "total", "free"):
        assert row in fits
    assert "refused" not in fits
    assert "shared" not in fits, "a CPU is always shared"
    refused = said(settings, DeviceMemory(needs - 1, GIB), monkeypatch)
    total = f"{needs / 2**20:,.1f} MiB"
    assert f"refused: device: the learner needs about {total} on cpu, and {total} of 1,024.0 MiB are free" in refused


def test_a_gpu_that_others_use_is_said_with_both_shares(tmp_path, monkeypatch):
    toys.llama().save_pretrained(tmp_path)
    settings = toys.config(tmp_path, model=str(tmp_path), device="cuda:0")
    needs = memory_needs(settings, tmp_path, GPU, 10).total
    shared = said(settings, DeviceMemory(8 * GIB, 80 * GIB), monkeypatch)
    assert "device: cuda:0 is shared: others, such as an engine, hold 73,728.0 MiB of its 81,920.0 MiB" in shared
    assert f"the learner needs about {needs / 2**20:,.1f} MiB" in shared
    alone = said(settings, DeviceMemory(80 * GIB - (500 << 20), 80 * GIB), monkeypatch)
    assert "shared" not in alone, "the learner's own CUDA context is not another user"


def test_the_memory_of_this_machine_is_read():
    memory = device_memory(CPU)
    assert 0 < memory.free <= memory.total


def test_a_gpu_computes_in_bfloat16_and_a_cpu_in_float32_unless_told(tmp_path):
    of = lambda device, **changes: compute_dtype(toys.config(tmp_path, **changes), device)  # noqa: E731
    assert (of(GPU), of(CPU)) == (torch.bfloat16, torch.float32)
    assert (of(GPU, dtype="float32"), of(CPU, dtype="bfloat16")) == (torch.float32, torch.bfloat16)
    assert of(CPU, weights_dtype="bfloat16") == torch.bfloat16
    with pytest.raises(ValueError, match="dtype: weights in bfloat16"):
        toys.config(tmp_path, weights_dtype="bfloat16", dtype="float32")


def test_weights_in_bfloat16_train_and_resume(tmp_path):
    settings = toys.config(tmp_path, weights_dtype="bfloat16", steps=2)
    learner = LocalLearner(settings, toys.llama().bfloat16())
    loop = toys.loop(settings, learner, toys.SamplingSource(toys.llama()))
    loop.run()
    assert any(
        not torch.equal(t, toys.llama().bfloat16().state_dict()[n]) for n, t in learner.policy.state_dict().items()
    )
    again = LocalLearner(settings, toys.llama().bfloat16())
    again.load(sorted((tmp_path / "checkpoints").iterdir())[-1])
    for name, tensor in learner.policy.state_dict().items():
        assert again.policy.state_dict()[name].dtype == torch.bfloat16
        assert torch.equal(again.policy.state_dict()[name], tensor)
    moments = {state["exp_avg"].dtype for state in again.optimiser.state.values()}
    assert moments == {torch.bfloat16}


T = 40


def shapes_of_attention(policy, batch, forward) -> set[tuple[int, ...]]:
    """Shapes of tensors with a number for each pair of tokens in each head, in both passes."""
    with Shapes() as shapes, forward:
        batch.hidden(policy).sum().backward()
    return {shape for shape in shapes.seen if len(shape) >= 3 and shape[-2:] == (T, T)}


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_attention_in_float32_keeps_no_number_for_each_pair_of_tokens(layout, monkeypatch):
    rollouts, policy = drawn([(T - 10, 10)] * 3), toys.llama()
    assert policy.config.num_key_value_heads < policy.config.num_attention_heads
    forward = packed_attention(policy) if layout == "packed" else torch.enable_grad()
    (batch,) = (packed_batches if layout == "packed" else padded_batches)(rollouts, 1000)
    assert shapes_of_attention(policy, batch, forward) == set()


HEADS, GROUPS = 6, 2


def attention():
    """The attention of a module with grouped heads: its arguments."""
    torch.manual_seed(0)
    states = (torch.randn(2, heads, T, 8) for heads in (HEADS, GROUPS, GROUPS))
    return SimpleNamespace(num_key_value_groups=HEADS // GROUPS, is_causal=True), *states, None


@pytest.mark.parametrize(
    ("device", "dtype", "repeats"),
    [("cuda", torch.float32, True), ("cuda", torch.bfloat16, False), ("cpu", torch.float32, False)],
)
def test_keys_and_values_are_repeated_where_torch_has_no_kernel_for_groups(device, dtype, repeats, monkeypatch):
    with FakeTensorMode():  # tensors of a GPU that is not there
        assert lacks_grouped_kernel(torch.empty(1, dtype=dtype, device=device)) is repeats
        monkeypatch.setattr("torch.is_autocast_enabled", lambda device: device == "cuda")
        assert not lacks_grouped_kernel(torch.empty(1, dtype=dtype, device=device)), "torch casts them to bfloat16"
    given = []
    monkeypatch.setattr("drafters.attention.sdpa_attention_forward", lambda *arguments: given.append(arguments))
    monkeypatch.setattr("drafters.attention.lacks_grouped_kernel", lambda key: repeats)
    attend(*attention())
    module, query, key, value, _ = given[0]
    assert (key.shape[1], value.shape[1]) == ((HEADS, HEADS) if repeats else (GROUPS, GROUPS))
    assert hasattr(module, "num_key_value_groups") is not repeats
    assert query.shape[1] == HEADS
    assert module.is_causal


def test_repeated_keys_and_values_give_the_same_attention(monkeypatch):
    found = []
    for repeats in (False, True):
        monkeypatch.setattr("drafters.attention.lacks_grouped_kernel", lambda key, repeats=repeats: repeats)
        module, *states, mask = attention()
        states = [state.requires_grad_() for state in states]
        output, _ = attend(module, *states, mask)
        output.square().sum().backward()
        found.append([output, *(state.grad for state in states)])
    for grouped, repeated in zip(*found, strict=True):
        torch.testing.assert_close(repeated, grouped, atol=1e-6, rtol=1e-5)


def test_torchs_math_kernel_is_noticed():
    """The check above sees the weights for each pair of tokens, where torch computes them."""
    _, query, key, value, _ = attention()
    with Shapes() as shapes, sdpa_kernel(SDPBackend.MATH):
        torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert {shape for shape in shapes.seen if len(shape) >= 3 and shape[-2:] == (T, T)}

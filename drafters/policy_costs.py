"""What a policy costs by its configuration: parameters, FLOPs a token, and bytes that a decoding step reads.

These are counts, and no times: how fast a machine works through them has to be measured.

A model is the sum of its parts. FLOPs are those of matrix products, convolutions, attention and recurrences: 2 for each
multiply-add. For weights, that is 2 N for N weights that a token passes (Kaplan et al. 2020, arXiv 2001.08361, table
1), with the output head. Norms, activation functions, softmax and sampling are left out, since they are small beside
them.

Bytes are those of weights and caches, each read once in a step. Writes, activations and the embedding's rows are left
out.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Costs:
    """Counts that add up over the parts of a model. They are numbers of elements, unless a field says otherwise."""

    matrices: int = 0
    """weights that multiply every token"""
    experts: int = 0
    """weights of all routed experts"""
    chosen: int = 0
    """weights of the routed experts that one token chooses"""
    vectors: int = 0
    """norms and biases"""
    embedding: int = 0
    """an embedding that is not the output head too: it multiplies nothing, and a token reads one row"""
    borrowed: int = 0
    """of a drafter: the policy's weights that multiply each of its tokens as well, and are not its own"""
    cached: int = 0
    """keys and values of one token"""
    attended: int = 0
    """multiply-adds of a token with each token of its context"""
    state: int = 0
    """recurrent state of one sequence"""
    recurrent: int = 0
    """multiply-adds of a token with that state"""

    def __add__(self, other: "Costs") -> "Costs":
        return Costs(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))

    @property
    def parameters(self) -> int:
        return self.matrices + self.experts + self.vectors + self.embedding

    @property
    def active_parameters(self) -> int:
        """All but the routed experts that a token does not choose. The embedding counts whole, as in model cards."""
        return self.matrices + self.chosen + self.vectors + self.embedding

    def flops_per_token(self, context: float) -> int:
        """FLOPs of the forward pass of one token that attends to `context` tokens, itself among them."""
        products = self.matrices + self.borrowed + self.chosen + self.recurrent
        return round(2 * (products + self.attended * context))

    def step_bytes(self, streams: int, context: float, element: int, tokens: int = 1) -> int:
        """Bytes that a step reads, for `streams` sequences of `context` tokens each.

        `element`: bytes of a number, in weights and caches alike. `tokens`: how many tokens of each sequence are in the
        step, which is the draft length + 1 when drafts are verified. They share the sequence's cache.

        Of the routed experts, the step reads those that any of its tokens chooses. If choices are uniform and
        independent, a token passes an expert by with probability 1 - K / N, and all n tokens do with (1 - K / N)^n. So
        N (1 - (1 - K / N)^n) experts are expected. A router with favourites, or alike tokens, reads fewer.
        """
        passed_by = (1 - self.chosen / self.experts) ** (streams * tokens) if self.experts else 1.0
        weights = self.matrices + self.borrowed + self.vectors + self.experts * (1 - passed_by)
        return round(element * (weights + streams * (context * self.cached + self.state)))


class DraftCosts(NamedTuple):
    """A drafter's passes in one step. The first goes over the tokens of the policy's last step, the later ones over one
    token of each sequence."""

    first: Costs
    later: Costs

    def draft_bytes(self, streams: int, context: float, element: int, draft_tokens: int) -> int:
        """Bytes that drafting `draft_tokens` tokens for each sequence reads."""
        first = self.first.step_bytes(streams, context, element, draft_tokens + 1)
        return first + (draft_tokens - 1) * self.later.step_bytes(streams, context, element)


def policy_costs(config: Any) -> Costs:
    """Of a policy with this configuration of transformers. Raises ValueError for an architecture without formulas."""
    layers = ARCHITECTURES.get(config.model_type)
    if layers is None:
        raise ValueError(f"no formulas for {config.model_type!r}, only for {', '.join(ARCHITECTURES)}")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError(f"no formulas for the sliding attention of this {config.model_type}")
    head = config.vocab_size * config.hidden_size
    ends = Costs(matrices=head, vectors=config.hidden_size, embedding=0 if config.tie_word_embeddings else head)
    return sum(layers(config), ends)


def cost_facts(config: Mapping[str, Any]) -> dict[str, str]:
    """What `drafters inspect` prints of the costs of the policy with this config.json."""
    from transformers import AutoConfig

    try:
        costs = policy_costs(AutoConfig.for_model(**config))
    except ValueError as error:
        return {"costs": str(error)}
    each = costs.flops_per_token(1) - costs.flops_per_token(0)
    state = f", and {costs.state:,} a sequence" if costs.state else ""
    return {
        "active parameters": f"{costs.active_parameters:,}",
        "FLOPs a token": f"{costs.flops_per_token(0):,}, and {each:,} for each token of context",
        "cached numbers": f"{costs.cached:,} for each token of context{state}",
    }


def linear(inputs: int, outputs: int, bias: bool = False) -> Costs:
    return Costs(matrices=inputs * outputs, vectors=outputs * bias)


def feed_forward(width: int, inner: int, bias: bool = False) -> Costs:
    """A gated layer: two projections up, one down."""
    return linear(width, 2 * inner, bias) + linear(inner, width, bias)


def attention(
    config: Any, *, inputs: int | None = None, bias: bool = False, normed: bool = False, gated: bool = False
) -> Costs:
    """Grouped-query attention. A query's product with a key, and a weight's with a value, are one multiply-add for each
    channel of each head. `inputs`: the width that queries, keys and values are projected from, if not the model's.
    `normed`: queries and keys are normed. `gated`: there is a gate for each channel of the output.
    """
    inputs = inputs or config.hidden_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    projections = (
        linear(inputs, queries * (2 if gated else 1), bias)
        + linear(inputs, 2 * keys, bias)
        + linear(queries, config.hidden_size, bias)
    )
    return projections + Costs(vectors=2 * config.head_dim * normed, cached=2 * keys, attended=2 * queries)


def mixture(config: Any, experts: int, projections: int, bias: bool = False) -> Costs:
    """The router and the routed experts of a width of `moe_intermediate_size`, each with this number of projections.

    With `moe_latent_size` (arXiv 2601.18089) the experts have that model width. The projections into the latent space
    and out of it are shared by all experts, so every token passes them. The router reads the full hidden state.
    """
    latent = getattr(config, "moe_latent_size", None)
    expert = projections * (latent or config.hidden_size) * config.moe_intermediate_size
    routed = Costs(experts=experts * expert, chosen=config.num_experts_per_tok * expert)
    shared = linear(config.hidden_size, latent, bias) + linear(latent, config.hidden_size, bias) if latent else Costs()
    return linear(config.hidden_size, experts) + routed + shared


def convolution(channels: int, kernel: int, bias: bool = False) -> Costs:
    """Depthwise: each weight multiplies each token once. Its state is the inputs of the tokens before."""
    return Costs(matrices=channels * kernel, vectors=channels * bias, state=channels * (kernel - 1))


def gated_delta_net(config: Any) -> Costs:
    """Qwen3-Next's linear attention (arXiv 2412.06464). A head's state has a number for each pair of a key's and a
    value's channel. A token reads it with its key, adds an outer product, and reads it with its query.
    """
    heads, key, value = config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim
    keys, values, state = config.linear_num_key_heads * key, heads * value, heads * key * value
    return (
        linear(config.hidden_size, 2 * keys + 2 * values)  # queries, keys, values and the output's gate
        + linear(config.hidden_size, 2 * heads)  # the rate of learning and of decay
        + convolution(2 * keys + values, config.linear_conv_kernel_dim)
        + linear(values, config.hidden_size)
        + Costs(vectors=2 * heads + value, state=state, recurrent=3 * state)
    )


def mamba2(config: Any) -> Costs:
    """Nemotron-H's recurrent layer (arXiv 2405.21060). A token adds an outer product to the state and reads it once."""
    heads, inner = config.mamba_num_heads, config.mamba_num_heads * config.mamba_head_dim
    channels, state = inner + 2 * config.n_groups * config.ssm_state_size, inner * config.ssm_state_size
    return (
        linear(config.hidden_size, inner + channels + heads, config.use_bias)
        + convolution(channels, config.conv_kernel, config.use_conv_bias)
        + linear(inner, config.hidden_size, config.use_bias)
        + Costs(vectors=3 * heads + inner, state=state, recurrent=2 * state)
    )


def llama(config: Any) -> Iterator[Costs]:
    layer = (
        attention(config, bias=config.attention_bias)
        + feed_forward(config.hidden_size, config.intermediate_size, config.mlp_bias)
        + Costs(vectors=2 * config.hidden_size)
    )
    yield from [layer] * config.num_hidden_layers


def qwen3(config: Any) -> Iterator[Costs]:
    layer = (
        attention(config, bias=config.attention_bias, normed=True)
        + feed_forward(config.hidden_size, config.intermediate_size)
        + Costs(vectors=2 * config.hidden_size)
    )
    yield from [layer] * config.num_hidden_layers


def qwen3_next(config: Any) -> Iterator[Costs]:
    for i, kind in enumerate(config.layer_types):
        dense = i in config.mlp_only_layers or not config.num_experts or (i + 1) % config.decoder_sparse_step
        yield qwen3_next_layer(config, kind, bool(dense))


def qwen3_next_layer(config: Any, kind: str, dense: bool = False) -> Costs:
    """Also LatentMoE's layer. Its shared expert has full width and a gate of one number."""
    width = config.hidden_size
    mixer = (
        attention(config, bias=config.attention_bias, normed=True, gated=True)
        if kind == "full_attention"
        else gated_delta_net(config)
    )
    experts = (
        feed_forward(width, config.intermediate_size)
        if dense
        else mixture(config, config.num_experts, projections=3)
        + feed_forward(width, config.shared_expert_intermediate_size)
        + linear(width, 1)
    )
    return mixer + experts + Costs(vectors=2 * width)


def nemotron_h(config: Any) -> Iterator[Costs]:
    for kind in config.layers_block_type:
        yield nemotron_h_layer(config, kind)


def nemotron_h_layer(config: Any, kind: str) -> Costs:
    """One mixer and its norm. Feed-forward layers and experts have no gate: one projection up, one down."""

    def ungated(inner: int) -> Costs:
        return linear(config.hidden_size, inner, config.mlp_bias) + linear(inner, config.hidden_size, config.mlp_bias)

    norm = Costs(vectors=config.hidden_size)
    match kind:
        case "full_attention":
            return norm + attention(config)
        case "linear_attention":
            return norm + mamba2(config)
        case "mlp":
            return norm + ungated(config.intermediate_size)
    routed = mixture(config, config.n_routed_experts, projections=2, bias=config.mlp_bias)
    return norm + routed + ungated(config.moe_shared_expert_intermediate_size)


ARCHITECTURES: dict[str, Callable[[Any], Iterator[Costs]]] = {
    "llama": llama,
    "qwen3": qwen3,
    "qwen3_next": qwen3_next,
    "latent_moe": qwen3_next,
    "nemotron_h": nemotron_h,
}
"""the layers of each architecture, by its `model_type`"""

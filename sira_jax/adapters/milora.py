"""MiLoRA: y = W0 x + gate_i s B A dropout(x), the LoRA i of a block being an expert and the prompt choosing. arXiv 2410.18035.

Not the method of the same name that trains minor singular components (arXiv 2406.09044).

Axis letters: B batch, T length, N examples of a row (slots for them), D features in, F features out, E experts, R rank.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from sira_jax import routing
from sira_jax.adapters.base import (
    ADAPTER,
    PATHS,
    AdapterConfig,
    AdapterFlops,
    Path,
)
from sira_jax.adapters.checks import check_count, check_not_negative
from sira_jax.adapters.context import AdapterContext, Projection
from sira_jax.adapters.low_rank import lora_pair
from sira_jax.errors import ConfigError, MergeError, check

POOLINGS = ("attention", "mean", "max", "last")
# Overrides of a projection: the rest belongs to the block's router.
OVERRIDABLE = ("alpha", "dropout_rate", "rank")
GATES = "milora_gates"
_NOT_MERGED = (
    "adapter.method='milora' cannot be merged into a plain kernel: the router picks other projections for each prompt, so no"
    " single matrix computes the same; save the adapter beside the base instead"
)

# Coefficients of the rational activation, of x^0 to x^6 and of x^1 to x^5, that come closest to GELU on [-10, 10]: the
# largest difference there is 0.0042, and at +-20 it is 0.4. GELU is x / 2 plus an even function, and so is the fit where the
# denominator is even and positive: with Q = b2 x^2 + b4 x^4, the odd part of P is (1 + Q) x / 2, and the even one was found as
# a minimax fit (least squares on 4000 Chebyshev points, linearised by the denominator of the step before, points weighted up by
# their error until the largest errors are equal). A fit on [-3, 3] alone is 100 times closer there, but grows as x^2 outside,
# and the residual stream is not confined to it.
GELU_NUMERATOR = (0.0, 0.5, 0.4149788, 0.1246190, 0.01658579, 9.416488e-4, 1.623830e-5)
GELU_DENOMINATOR = (0.0, 0.2492380, 0.0, 1.8832975e-3, 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiLoRAConfig(AdapterConfig):
    """Fields of MiLoRA: those of AdapterConfig (`overrides` may set OVERRIDABLE alone) and

    Attributes:
      rank: width R of a pair [P: 32].
      alpha: the default gives the scale s = 2 [C].
      num_selected_experts: experts that a prompt selects in a block, k, at most E [P: 3]. E is the number of targeted
        projections of a block, 7 if all are [P], in the order of `adapters.base.PATHS`.
      pooling: how a prompt's hidden states become one vector, one of POOLINGS [P: all four, "attention" the default]: a
        softmax over the prompt's tokens of their products with a trained query; their mean; the largest value of each feature;
        or the last token's.
      renormalize: divide the selected gates by their sum [C: no].
      load_balance_loss_weight: weight of E * sum over e of f_e P_e over the prompts of a batch [P: 1e-2].
      router_init_std: standard deviation of the router's and the query's normal initialisation [C].
    """

    method: ClassVar[str] = "milora"
    training_fields: ClassVar[frozenset[str]] = AdapterConfig.training_fields | {
        "load_balance_loss_weight",
        "router_init_std",
    }

    rank: int = 32
    alpha: float = 64.0
    num_selected_experts: int = 3
    pooling: str = "attention"
    renormalize: bool = False
    load_balance_loss_weight: float = 1e-2
    router_init_std: float = 0.02

    def __post_init__(self):
        super().__post_init__()
        check(
            len(self.experts) > 0,
            "adapter.targets",
            self.targets,
            f"patterns that match at least one of {', '.join(PATHS)}",
        )
        check_count("num_selected_experts", self.num_selected_experts, len(self.experts))
        check(
            self.pooling in POOLINGS,
            "adapter.pooling",
            self.pooling,
            f"one of {', '.join(POOLINGS)}",
        )
        check(
            isinstance(self.renormalize, bool),
            "adapter.renormalize",
            self.renormalize,
            "true or false",
        )
        check_not_negative("load_balance_loss_weight", self.load_balance_loss_weight)
        check_not_negative("router_init_std", self.router_init_std)
        for pattern, fields in self.overrides:
            names = [name for name, _ in fields]
            check(
                set(names) <= set(OVERRIDABLE),
                f"adapter.overrides[{pattern!r}]",
                names,
                f"fields out of {', '.join(OVERRIDABLE)}, as a block's projections share one router",
            )

    def check_model(self, projections: Mapping[str, tuple[int, int]]) -> None:
        super().check_model(projections)
        others = [path for path in projections if path not in PATHS and self.is_target(path)]
        if others:
            raise ConfigError(
                f"adapter.method={self.method!r} is not allowed: it routes by the prompt that each block reads, and a"
                f" decoder with an encoder reads none; the model has {others[0]}"
            )

    @property
    def experts(self) -> tuple[str, ...]:
        """Paths of a block's targeted projections; the place of one is its expert's number."""
        return tuple(path for path in PATHS if self.is_target(path))

    @property
    def router_config(self) -> routing.RoutingConfig:
        """The block's routing, without a limit on how many prompts select an expert."""
        return routing.RoutingConfig(
            num_experts=len(self.experts),
            num_selected_experts=self.num_selected_experts,
            capacity_factor=None,
            renormalize=self.renormalize,
        )

    def make_module(self) -> nn.Module:
        return MiLoRA(config=self, name=ADAPTER)

    def make_block_module(self) -> nn.Module:
        return MiLoRARouter(config=self, name=ADAPTER)

    def merge(self, params: Mapping[str, jax.Array], kernel_DF: jax.Array) -> jax.Array:
        """Always raises MergeError: which experts act depends on the prompt."""
        raise MergeError(_NOT_MERGED)

    def merge_tree(
        self, adapters: Mapping[Path, Mapping[str, Any]], kernels: Mapping[Path, jax.Array]
    ) -> dict[Path, jax.Array]:
        """Always raises MergeError, as `merge`."""
        raise MergeError(_NOT_MERGED)

    def count_parameters(self, d_in: int, d_out: int) -> int:
        return self.rank * (d_in + d_out)

    def count_block_parameters(self, emb_dim: int) -> int:
        """The router, the coefficients of the activation and the query of "attention"."""
        query = emb_dim if self.pooling == "attention" else 0
        coefficients = len(GELU_NUMERATOR) + len(GELU_DENOMINATOR)
        return emb_dim * len(self.experts) + coefficients + query

    def active_parameters(self, d_in: int, d_out: int) -> int:
        """The mean where every projection is selected alike often: k of E prompts have the pair."""
        share = self.num_selected_experts / len(self.experts)
        return round(share * self.count_parameters(d_in, d_out))

    def flops_per_token(self, d_in: int, d_out: int) -> AdapterFlops:
        """The mean, as of `active_parameters`. The router runs once a prompt and block and is not counted."""
        return AdapterFlops(total=2 * self.active_parameters(d_in, d_out))


def rational(x: jax.Array, numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """P(x) / (1 + |Q(x)|), elementwise; no pole whatever the coefficients [C: the safe form, as arXiv 1907.06732].

    Args:
      x: any shape.
      numerator: coefficients of P, of x^0 first.
      denominator: coefficients of Q, of x^1 first.
    """

    def polynomial(coefficients):
        total = jnp.zeros_like(x)
        for power in reversed(range(coefficients.shape[0])):
            total = total * x + coefficients[power]
        return total

    return polynomial(numerator) / (1 + jnp.abs(x * polynomial(denominator)))


@dataclasses.dataclass(frozen=True)
class _Examples:
    """The examples of each row, numbered in their order.

    Attributes:
      number_BT: which example a token is of, never falling along a row; of padding, that of a neighbour.
      first_BT: True at an example's first token.
      prompt_BT: True at the tokens of prompts; the first token of an example that has no other.
      slots: N, at least the number of examples in a row.
    """

    number_BT: jax.Array
    first_BT: jax.Array
    prompt_BT: jax.Array
    slots: int

    def reduce(self, reduction: Callable, values: jax.Array) -> jax.Array:
        """A reduction of jax.ops ("segment_sum") over each example's tokens: (B, T, ...) to (B, N, ...)."""

        def row(values, number):
            return reduction(values, number, num_segments=self.slots, indices_are_sorted=True)

        return jax.vmap(row)(values, self.number_BT)

    def spread(self, values: jax.Array) -> jax.Array:
        """What belongs to each token's example: (B, N, ...) to (B, T, ...)."""
        return jax.vmap(lambda values, number: values[number])(values, self.number_BT)


def _find_examples(context: AdapterContext, shape: tuple[int, int]) -> _Examples:
    valid_BT = context.valid_or_all(shape)
    segments_BT = context.segment_ids_BT
    slots = shape[1]
    if segments_BT is None or context.decoding:
        # One example a row.
        segments_BT, slots = jnp.ones(shape, jnp.int32), 1
    segments_BT = jnp.where(valid_BT, segments_BT, 0)
    before_BT = jnp.pad(segments_BT[:, :-1], ((0, 0), (1, 0)))
    first_BT = (segments_BT > 0) & (segments_BT != before_BT)
    number_BT = jnp.clip(jnp.cumsum(first_BT, axis=1) - 1, 0, slots - 1)
    prompt_BT = segments_BT > 0
    if context.prompt_BT is not None:
        prompt_BT &= context.prompt_BT
    examples = _Examples(number_BT, first_BT, prompt_BT, slots)
    prompts_BN = examples.reduce(jax.ops.segment_sum, prompt_BT.astype(jnp.int32))
    without_BT = examples.spread(prompts_BN) == 0
    return dataclasses.replace(examples, prompt_BT=prompt_BT | (first_BT & without_BT))


def pool(
    x_BTD: jax.Array, examples: _Examples, pooling: str, query_D: jax.Array | None
) -> jax.Array:
    """The prompts' vectors (B, N, D), float32; of slots without an example 0."""
    prompt_BT1 = examples.prompt_BT[..., None]
    x_BTD = jnp.where(prompt_BT1, x_BTD.astype(jnp.float32), 0.0)
    total = jax.ops.segment_sum
    if pooling == "last":
        place_BT = jnp.where(examples.prompt_BT, jnp.arange(x_BTD.shape[1]), -1)
        last_BN = examples.reduce(jax.ops.segment_max, place_BT)
        # Slots without an example hold no place: they take token 0, and go.
        found_BND = jnp.take_along_axis(x_BTD, jnp.maximum(last_BN, 0)[..., None], axis=1)
        return jnp.where(last_BN[..., None] >= 0, found_BND, 0.0)
    if pooling == "mean":
        weights_BT1 = prompt_BT1.astype(jnp.float32)
    elif pooling == "max":
        # The largest values as a sum over where they are, since scatter-max has no gradient; ties share it.
        low_BTD = jnp.where(prompt_BT1, x_BTD, -jnp.inf)
        best_BND = examples.reduce(jax.ops.segment_max, jax.lax.stop_gradient(low_BTD))
        is_best_BTD = (x_BTD == examples.spread(best_BND)) & prompt_BT1
        weights_BT1 = is_best_BTD.astype(jnp.float32)
    else:
        scores_BT1 = routing.router_logits(x_BTD, query_D[:, None])
        low_BT1 = jnp.where(prompt_BT1, scores_BT1, -jnp.inf)
        best_BN1 = examples.reduce(jax.ops.segment_max, jax.lax.stop_gradient(low_BT1))
        # Masked before the exponential too, so that no gradient is 0 times infinity.
        shifted_BT1 = jnp.where(prompt_BT1, scores_BT1 - examples.spread(best_BN1), 0.0)
        weights_BT1 = jnp.where(prompt_BT1, jnp.exp(shifted_BT1), 0.0)
    sums_BN = examples.reduce(total, weights_BT1)
    pooled_BND = examples.reduce(total, weights_BT1 * x_BTD)
    return pooled_BND / jnp.where(sums_BN == 0, 1.0, sums_BN)


class MiLoRARouter(nn.Module):
    """The router of a block. Parameters, float32: router (D, E) and query (D,) normal, numerator (7,), denominator (5,).

    Sows into `losses` the weighted load-balancing loss and into `metrics` the router's statistics, each over prompts, not
    tokens. While decoding the first call routes, whose tokens are the prompts, one a row, and keeps the gates (B, E) in
    the collection `cache`; later calls take them from there.
    """

    config: MiLoRAConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: AdapterContext) -> jax.Array:
        """Gates of each token's example, (B, T, E), or (B, 1, E) where a row is one example; float32."""
        if context.decoding and self.has_variable("cache", GATES):
            return self.get_variable("cache", GATES)[:, None]
        config = self.config
        d_in, experts = x_BTD.shape[-1], len(config.experts)
        normal = nn.initializers.normal(config.router_init_std)
        router_DE = self.param(
            "router",
            nn.with_logical_partitioning(normal, ("adapter_embed", "expert")),
            (d_in, experts),
        )
        query_D = None
        if config.pooling == "attention":
            query_D = self.param(
                "query", nn.with_logical_partitioning(normal, ("adapter_embed",)), (d_in,)
            )
        coefficients = []
        for name, start in (("numerator", GELU_NUMERATOR), ("denominator", GELU_DENOMINATOR)):
            init = nn.with_logical_partitioning(
                lambda key, shape, start=start: jnp.asarray(start, jnp.float32), (None,)
            )
            coefficients.append(self.param(name, init, (len(start),)))
        examples = _find_examples(context, x_BTD.shape[:2])
        pooled_BND = pool(x_BTD, examples, config.pooling, query_D)
        # Recomputed in the backward pass: its dozen intermediate arrays are as large as the block's input.
        pooled_BND = jax.checkpoint(rational)(pooled_BND, *coefficients)
        exists_BN = examples.reduce(jax.ops.segment_sum, examples.first_BT.astype(jnp.int32)) > 0
        routed = routing.route(
            routing.router_logits(pooled_BND, router_DE),
            exists_BN,
            config.router_config,
            deterministic=context.deterministic,
        )
        loss = config.load_balance_loss_weight * routing.load_balance_loss(routed)
        self.sow("losses", "router", loss)
        if self.is_mutable_collection("metrics"):
            tasks_BN, num_tasks = None, 0
            if context.num_tasks and context.task_ids_BT is not None:
                tasks_BT = jnp.where(examples.first_BT, context.task_ids_BT, -1)
                tasks_BN = examples.reduce(jax.ops.segment_max, tasks_BT)
                num_tasks = context.num_tasks
            self.sow("metrics", "router", routing.router_stats(routed, tasks_BN, num_tasks))
        if context.decoding:
            self.put_variable("cache", GATES, routed.gates_GSE[:, 0])
        return examples.spread(routed.gates_GSE) if examples.slots > 1 else routed.gates_GSE


class MiLoRA(nn.Module):
    """Parameters, float32: lora_a (D, R) kaiming-uniform, lora_b (R, F) zero.

    `context.block` holds the gates that MiLoRARouter returned; by itself, without a block, a projection has the gate 1.
    """

    config: MiLoRAConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, projection: Projection, context: AdapterContext
    ) -> jax.Array:
        """The frozen projection's output (B, T, F) plus the gated low-rank term."""
        config = self.config
        y_BTF = projection(x_BTD)
        lora_a_DR, lora_b_RF = lora_pair(self, projection, config.rank)
        x_BTD = nn.Dropout(config.dropout_rate)(x_BTD, deterministic=context.deterministic)
        hidden_BTR = config.scale * routing.project(x_BTD, lora_a_DR.astype(x_BTD.dtype))
        if context.block is not None:
            expert = config.experts.index(projection.path)
            hidden_BTR *= context.block[..., expert : expert + 1]
        delta_BTF = routing.project(hidden_BTR.astype(x_BTD.dtype), lora_b_RF.astype(x_BTD.dtype))
        return y_BTF + delta_BTF.astype(y_BTF.dtype)

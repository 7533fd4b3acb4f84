"""DoRA (dynamic rank): y = W0 x + s B diag(c * mask) A x, components pruned in training over the whole model. 2405.17357 [O].

Axis letters: B batch, T length, D features in, F features out, R components a projection (the start rank), L layers,
M components a layer, of all projections, P pruning events.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sira_jax.adapters.base import ADAPTER, AdapterFlops, Path, StepInfo
from sira_jax.adapters.checks import check_between, check_count
from sira_jax.adapters.context import AdapterContext, Projection
from sira_jax.adapters.low_rank import LowRankConfig, low_rank_term
from sira_jax.adapters.trees import (
    by_layer,
    by_projection,
    from_projections,
    is_stacked,
)
from sira_jax.errors import check

# What a step's end changes; A and B are only read then.
_STATE = ("component_scale", "buffer_score", "buffer_mask")
_WHOLE_MODEL = ("prune_end", "prune_every", "prune_start", "score_decay")
# Products such as 0.55 * 100 lie above the whole number that is meant.
_DIGITS = 6

Components = dict[str, dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicDoRAConfig(LowRankConfig):
    """Fields of dynamic-rank DoRA: those of AdapterConfig, and

    `rank` is how many components a projection keeps on average; s = alpha / rank [C]. The official code divides alpha by the
    start rank r0: an alpha multiplied by rank / r0 gives its scale.

    Attributes:
      start_rank_factor: a projection starts with r0 = ceil(start_rank_factor * rank) components [O: 1.5].
      score_decay: of the scores' moving average, a step [O: 0.9].
      prune_start: share of the training after which pruning starts [O: 0.15].
      prune_end: share of the training after which the final mask is fixed [O: 0.5].
      prune_every: pruning happens at steps that are multiples of it, and at the last one of the window [O: 100].
      variance_penalty_weight: weight of the variance within components, until pruning ends [O: 0.1].

    The four fields of the scores and the window hold for the whole model and cannot be overridden for a projection.
    """

    method: ClassVar[str] = "dynamic_dora"
    training_fields: ClassVar[frozenset[str]] = LowRankConfig.training_fields | {
        *_WHOLE_MODEL,
        "variance_penalty_weight",
    }

    start_rank_factor: float = 1.5
    score_decay: float = 0.9
    prune_start: float = 0.15
    prune_end: float = 0.5
    prune_every: int = 100
    variance_penalty_weight: float = 0.1

    def __post_init__(self):
        check_between("start_rank_factor", self.start_rank_factor, 1.0)
        check_between("score_decay", self.score_decay, 0.0, 1.0)
        check(self.score_decay < 1, "adapter.score_decay", self.score_decay, "under 1")
        check_between("prune_start", self.prune_start, 0.0, 1.0)
        check_between("prune_end", self.prune_end, 0.0, 1.0)
        check(
            self.prune_start < self.prune_end,
            "adapter.prune_end",
            self.prune_end,
            f"over prune_start={self.prune_start}",
        )
        check_count("prune_every", self.prune_every)
        check_between("variance_penalty_weight", self.variance_penalty_weight, 0.0)
        super().__post_init__()
        for pattern, fields in self.overrides:
            for name, value in fields:
                check(
                    name not in _WHOLE_MODEL or value == getattr(self, name),
                    f"adapter.overrides[{pattern!r}].{name}",
                    value,
                    "that of the whole model, whose components are scored and pruned together",
                )

    @property
    def start_rank(self) -> int:
        """r0, the components of a projection before pruning."""
        return math.ceil(round(self.start_rank_factor * self.rank, _DIGITS))

    @property
    def trained_rank(self) -> int:
        return self.start_rank

    def make_module(self) -> nn.Module:
        return DynamicDoRA(config=self, name=ADAPTER)

    def as_lora(self, params: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """The pair a (D, R), b (R, F) with delta = scale * a @ b: c * mask in b. Leading axes, of layers, go along."""
        scale_R = params["component_scale"] * params["buffer_mask"]
        return params["lora_a"], scale_R[..., None] * params["lora_b"]

    def count_parameters(self, d_in: int, d_out: int) -> int:
        return self.start_rank * (d_in + d_out + 1)

    def flops_per_token(self, d_in: int, d_out: int) -> AdapterFlops:
        """All r0 components, as they are computed; after pruning a merged or exported adapter needs fewer."""
        return AdapterFlops(total=self.start_rank * (2 * (d_in + d_out) + 1))

    def pruning_events(self, num_steps: int) -> list[tuple[int, float]]:
        """(step, share of the components in excess that are pruned at its end), steps counted from 1.

        The share is t^3, t going from 0 at the window's start to 1 at its end. The last event comes for any number of steps.
        """
        start = self.prune_start * num_steps
        last = max(1, math.ceil(round(self.prune_end * num_steps, _DIGITS)))
        steps = [step for step in range(self.prune_every, last, self.prune_every) if step >= start]
        return [(step, ((step - start) / (last - start)) ** 3) for step in steps] + [(last, 1.0)]

    def after_step(self, adapter: dict[str, Any], info: StepInfo) -> tuple[dict[str, Any], None]:
        """Scores the components, and prunes those of the lowest scores where the step is one of `pruning_events`.

        At an event but the last their c is set to 0, from where it may grow again; the last one fixes the mask. Of the model's
        components exactly as many stay as its projections' ranks sum up to.
        """
        leaves = by_projection(adapter)
        components = _stack_layers(leaves)
        excess = 0
        for name, tree in components.items():
            layers, start_rank = tree["buffer_mask"].shape
            excess += layers * (start_rank - self.for_projection(name).rank)
        events = self.pruning_events(info.num_steps)
        steps_P = jnp.array([step for step, _ in events], jnp.int32)
        counts_P = jnp.array([math.floor(share * excess) for _, share in events], jnp.int32)
        last = events[-1][0]

        def score_and_prune(state: Components) -> Components:
            scored = {
                name: tree | {"buffer_score": self._score(components[name] | tree)}
                for name, tree in state.items()
            }
            event = jnp.searchsorted(steps_P, info.step)
            return jax.lax.cond(
                steps_P[event] == info.step,
                lambda scored: _prune(scored, counts_P[event], info.step == last),
                lambda scored: scored,
                scored,
            )

        # Conditions, so that most steps sort nothing, and those after the last event do not score either.
        state = {name: {key: tree[key] for key in _STATE} for name, tree in components.items()}
        state = jax.lax.cond(info.step <= last, score_and_prune, lambda state: state, state)
        return from_projections(_unstack_layers(state, leaves)), None

    def _score(self, tree: dict[str, jax.Array]) -> jax.Array:
        """The moving average (L, R) of the components' shares of the norm of delta W."""
        old_LR = tree["buffer_score"]
        shares_LR = jax.vmap(component_shares)(
            tree["lora_a"], tree["lora_b"], tree["component_scale"] * tree["buffer_mask"]
        )
        return self.score_decay * old_LR + (1 - self.score_decay) * shares_LR


def component_shares(a_DR: jax.Array, b_RF: jax.Array, scale_R: jax.Array) -> jax.Array:
    """||A_i c_i B_i||_F / ||A diag(c) B||_F (R,), 0 where both are 0; the product (D, F) is never formed."""
    highest = jax.lax.Precision.HIGHEST
    gram_a_RR = jnp.matmul(a_DR.T, a_DR, precision=highest)
    gram_b_RR = jnp.matmul(b_RF, b_RF.T, precision=highest)
    products_RR = gram_a_RR * gram_b_RR * scale_R[:, None] * scale_R
    whole = jnp.sum(products_RR)
    norm_R = jnp.sqrt(jnp.diagonal(products_RR))
    return jnp.where(whole > 0, norm_R * jax.lax.rsqrt(jnp.where(whole > 0, whole, 1.0)), 0.0)


def variance_penalty(a_DR: jax.Array, b_RF: jax.Array) -> jax.Array:
    """Mean over the 2 R vectors A_i and B_i of the variance of a vector's elements, with Bessel's correction [O]."""
    return 0.5 * (jnp.mean(jnp.var(a_DR, axis=0, ddof=1)) + jnp.mean(jnp.var(b_RF, axis=1, ddof=1)))


def _stack_layers(leaves: Mapping[Path, Mapping[str, jax.Array]]) -> Components:
    """Projection name -> its leaves with the layers first, by name: one order and one arithmetic for both layouts."""
    places = by_layer(leaves)
    components = {}
    for name in sorted(places):
        trees = [leaves[path] for path, _ in places[name]]
        if is_stacked(places[name][0][0]):
            components[name] = dict(trees[0])
        else:
            components[name] = jax.tree.map(lambda *layers: jnp.stack(layers), *trees)
    return components


def _unstack_layers(
    state: Components, leaves: Mapping[Path, Mapping[str, jax.Array]]
) -> dict[Path, dict[str, jax.Array]]:
    """The adapters' leaves with the changed ones put in, in the layout of `leaves`."""
    changed = {}
    for name, places in by_layer(leaves).items():
        for number, (path, index) in enumerate(places):
            own = state[name]
            if index is None:
                own = {key: leaf[number] for key, leaf in own.items()}
            changed[path] = leaves[path] | own
    return changed


def _prune(components: Components, count: jax.Array, is_last: jax.Array) -> Components:
    """Sets c of the `count` lowest-scored components of the model to 0; at the last event the mask too.

    Of equal scores that of the earlier layer goes first, then by the projection's name, then that of the lower index.
    """
    shapes = {name: tree["buffer_score"].shape for name, tree in components.items()}
    # Stacks of layers may differ in depth: component i of the concatenated scores is of layer layers_N[i].
    layers_N = np.concatenate(
        [np.repeat(np.arange(shape[0]), shape[1]) for shape in shapes.values()]
    )
    by_layer_N = np.argsort(layers_N, kind="stable")
    scores_N = jnp.concatenate([tree["buffer_score"].ravel() for tree in components.values()])
    order_N = jnp.asarray(by_layer_N)[jnp.argsort(scores_N[by_layer_N], stable=True)]
    places_N = jnp.argsort(order_N)
    pruned, start = {}, 0
    for name, tree in components.items():
        end = start + math.prod(shapes[name])
        kept_LR = (places_N[start:end] >= count).astype(jnp.float32).reshape(shapes[name])
        start = end
        pruned[name] = tree | {
            "component_scale": tree["component_scale"] * kept_LR,
            "buffer_mask": jnp.where(is_last, kept_LR, tree["buffer_mask"]),
        }
    return pruned


def _kaiming_uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """U(-b, b), b = sqrt(6 / fan-in), the gain of a ReLU [O]; `shape` is (fan-in, fan-out)."""
    bound = math.sqrt(6 / shape[0])
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class DynamicDoRA(nn.Module):
    """Parameters, float32: lora_a (D, R) and lora_b (R, F) kaiming-uniform, component_scale (R,), which is c, zero.

    Buffers: buffer_score (R,) zero, buffer_mask (R,) one. Sows into `losses` the weighted variance penalty (a scalar).
    """

    config: DynamicDoRAConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, projection: Projection, context: AdapterContext
    ) -> jax.Array:
        """The frozen projection's output (B, T, F) plus the components that are not pruned."""
        config = self.config
        (d_in, d_out), (in_axis, out_axis) = projection.shape, projection.adapter_axes
        y_BTF = projection(x_BTD)
        rank = config.start_rank

        def param(name, init, axes, shape):
            return self.param(name, nn.with_logical_partitioning(init, axes), shape)

        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        a_DR = param("lora_a", _kaiming_uniform, (in_axis, "rank"), (d_in, rank))
        b_RF = param("lora_b", _kaiming_uniform, ("rank", out_axis), (rank, d_out))
        c_R = param("component_scale", zeros, ("rank",), (rank,))
        mask_R = param("buffer_mask", ones, ("rank",), (rank,))
        param("buffer_score", zeros, ("rank",), (rank,))
        weight = config.variance_penalty_weight
        if weight and not context.deterministic and context.progress is not None:
            penalty = jnp.where(
                context.progress < config.prune_end, variance_penalty(a_DR, b_RF), 0
            )
            self.sow("losses", "variance", weight * penalty)
        scale_R = config.scale * c_R * mask_R
        delta_BTF = low_rank_term(x_BTD, a_DR, b_RF, scale_R, config.dropout_rate, context)
        return y_BTF + delta_BTF.astype(y_BTF.dtype)

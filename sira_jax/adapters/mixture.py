"""What the soft mixtures share (MoLoRA, MoV, MALoRA): a router that weighs all experts, its loss and its statistics.

p = softmax(x Wg) over all experts, float32, no bias. arXiv 2309.05444 [O].

Axis letters: B batch, T length, D features in, F features out, E experts, R rank, M = E * R joined ranks.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from sira_jax import routing
from sira_jax.adapters.base import AdapterConfig, AdapterFlops
from sira_jax.adapters.checks import check_count, check_not_negative
from sira_jax.adapters.context import AdapterContext, Projection
from sira_jax.errors import MergeError


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureConfig(AdapterConfig):
    """Fields of every soft mixture: those of AdapterConfig, and

    Attributes:
      num_experts: experts of a projection, E [C: 8].
      num_selected_experts: k; where given, the gates of all but the k most probable experts are 0, and the others are not
        renormalised. None weighs all E [O]. No expert has a capacity.
      router_init_std: standard deviation of the router's normal initialisation [O: 0.02].
      load_balance_loss_weight: weight of the load-balancing loss (see `load_balance_loss`) [C: 0, as the official
        code's router leaves it off].
    """

    training_fields: ClassVar[frozenset[str]] = AdapterConfig.training_fields | {
        "load_balance_loss_weight",
        "router_init_std",
    }

    num_experts: int = 8
    num_selected_experts: int | None = None
    router_init_std: float = 0.02
    load_balance_loss_weight: float = 0.0

    def __post_init__(self):
        check_count("num_experts", self.num_experts)
        if self.num_selected_experts is not None:
            check_count("num_selected_experts", self.num_selected_experts, self.num_experts)
        check_not_negative("router_init_std", self.router_init_std)
        check_not_negative("load_balance_loss_weight", self.load_balance_loss_weight)
        super().__post_init__()

    @property
    def experts_per_token(self) -> int:
        """k, or E without a selection."""
        return self.num_selected_experts or self.num_experts

    @property
    def trained_rank(self) -> int:
        return self.num_experts * self.rank

    def merge(self, params: Mapping[str, jax.Array], kernel_DF: jax.Array) -> jax.Array:
        """Always raises MergeError: the weights of the experts depend on the token."""
        raise MergeError(
            f"adapter.method={self.method!r} cannot be merged into a plain kernel: the router weighs the experts anew for"
            " each token, so no single matrix computes the same; save the adapter beside the base instead"
        )

    @abc.abstractmethod
    def expert_parameters(self, d_in: int, d_out: int) -> int:
        """Trained parameters of one expert."""

    def shared_parameters(self, d_in: int, d_out: int) -> int:
        """Trained parameters that all experts share, without the router's."""
        del d_in, d_out
        return 0

    def count_parameters(self, d_in: int, d_out: int) -> int:
        shared = d_in * self.num_experts + self.shared_parameters(d_in, d_out)
        return shared + self.num_experts * self.expert_parameters(d_in, d_out)

    def active_parameters(self, d_in: int, d_out: int) -> int:
        """The router, what the experts share, and k experts."""
        unused = self.num_experts - self.experts_per_token
        return self.count_parameters(d_in, d_out) - unused * self.expert_parameters(d_in, d_out)

    def flops_per_token(self, d_in: int, d_out: int) -> AdapterFlops:
        """A multiplication and an addition for each parameter a token uses."""
        return AdapterFlops(
            total=2 * self.active_parameters(d_in, d_out), router=2 * d_in * self.num_experts
        )


@struct.dataclass
class Gate:
    """How a router weighs the experts. Rows of padding are 0 or False throughout.

    Attributes:
      probs_BTE: float32 softmax over all experts.
      gates_BTE: float32 weights of the experts: `probs_BTE`, 0 where not selected.
      selected_BTE: bool, the k most probable experts; None where all are.
      valid_BT: bool, False for padding.
    """

    probs_BTE: jax.Array
    gates_BTE: jax.Array
    selected_BTE: jax.Array | None
    valid_BT: jax.Array


def soft_gate(logits_BTE: jax.Array, valid_BT: jax.Array, config: MixtureConfig) -> Gate:
    """The gate from float32 router logits; ties of a selection go to the lower index."""
    if config.experts_per_token < config.num_experts:
        options = routing.RoutingConfig(
            num_experts=config.num_experts,
            num_selected_experts=config.experts_per_token,
            capacity_factor=None,
        )
        routed = routing.route(logits_BTE, valid_BT, options, deterministic=True)
        return Gate(routed.probs_GSE, routed.gates_GSE, routed.selected_GSE, routed.valid_GS)
    # Without a selection no expert needs a rank. Padding is masked before the softmax too, so that nothing in it can
    # reach a gradient as inf * 0.
    valid_BT = valid_BT.astype(bool)
    logits_BTE = jnp.where(valid_BT[..., None], logits_BTE, 0.0)
    probs_BTE = jnp.where(valid_BT[..., None], jax.nn.softmax(logits_BTE, axis=-1), 0.0)
    return Gate(probs_BTE, probs_BTE, None, valid_BT)


def load_balance_loss(gate: Gate) -> jax.Array:
    """E * sum over e of f_e P_e over all valid tokens, a float32 scalar; 0 without a valid token.

    P_e is the mean probability of expert e. With a selection f_e is the share of tokens that have e among their k, as in
    SiRA. Without one every token has every expert, that share would be 1 and the loss the constant E, so f_e is P_e [C]: 1
    for an even use of the experts, E where all tokens use one. Gradients flow through every P_e.
    """
    keep = routing.keep
    tokens = jnp.maximum(keep(jnp.sum(gate.valid_BT, dtype=jnp.float32)), 1.0)
    mean_prob_E = keep(jnp.sum(gate.probs_BTE, axis=(0, 1))) / tokens
    share_E = mean_prob_E
    if gate.selected_BTE is not None:
        share_E = keep(jnp.sum(gate.selected_BTE, axis=(0, 1), dtype=jnp.float32)) / tokens
    return gate.probs_BTE.shape[-1] * jnp.sum(share_E * mean_prob_E)


def mixture_stats(
    gate: Gate, task_ids_BT: jax.Array | None = None, num_tasks: int = 0
) -> routing.RouterStats:
    """The router's sums over the valid tokens, without gradients.

    Every expert meets every token, so a count of pairs would say nothing of their use: `kept_pairs_E` has each token's k pairs
    shared out in proportion to its gates. An expert's load is then its mean share of the mixture. No pair is ever dropped.

    Args:
      gate: the gate.
      task_ids_BT: int, the task of each token, from 0; needed if `num_tasks` is over 0.
      num_tasks: Z, static.
    """
    gate = jax.lax.stop_gradient(gate)
    probs_BTE = gate.probs_BTE
    if gate.selected_BTE is None:
        pairs_BTE = probs_BTE * probs_BTE.shape[-1]
        selected_pairs = jnp.sum(gate.valid_BT, dtype=jnp.float32) * probs_BTE.shape[-1]
    else:
        total_BT1 = jnp.sum(gate.gates_BTE, axis=-1, keepdims=True)
        count_BT1 = jnp.sum(gate.selected_BTE, axis=-1, keepdims=True, dtype=jnp.float32)
        pairs_BTE = gate.gates_BTE * count_BT1 / jnp.where(total_BT1 == 0, 1.0, total_BT1)
        selected_pairs = jnp.sum(count_BT1)
    return routing.sum_stats(
        probs_BTE,
        gate.valid_BT,
        pairs_BTE,
        selected_pairs=selected_pairs,
        dropped_pairs=jnp.float32(0),
        task_ids_GS=task_ids_BT,
        num_tasks=num_tasks,
    )


def route_tokens(
    module: nn.Module,
    x_BTD: jax.Array,
    projection: Projection,
    config: MixtureConfig,
    context: AdapterContext,
) -> Gate:
    """The gate of x from the router of `module`, whose loss and statistics it sows."""
    logits_BTE = routing.router_logits(x_BTD, _router(module, projection, config))
    return _gate_and_sow(module, logits_BTE, config, context)


def route_and_project(
    module: nn.Module,
    x_BTD: jax.Array,
    weights_DM: jax.Array,
    projection: Projection,
    config: MixtureConfig,
    context: AdapterContext,
) -> tuple[jax.Array, Gate]:
    """The gate of x as `route_tokens` gives it, and dropout(x) @ weights, (B, T, M) in float32, 0 for padding.

    A float32 x meets the weights and the router in one product, forwards and backwards, at the precision the router needs.
    The router does not see the dropout.
    """
    router_DE = _router(module, projection, config)
    dropped_BTD = x_BTD
    drops = config.dropout_rate > 0 and not context.deterministic
    if drops:
        dropped_BTD = nn.Dropout(config.dropout_rate)(x_BTD, deterministic=False)
    if routing.can_join(x_BTD.dtype) and not drops:
        hidden_BTM, logits_BTE = routing.project_with_router(x_BTD, weights_DM, router_DE)
    else:
        hidden_BTM = routing.project(dropped_BTD, weights_DM.astype(x_BTD.dtype))
        logits_BTE = routing.router_logits(x_BTD, router_DE)
    gate = _gate_and_sow(module, logits_BTE, config, context)
    # Large padding may overflow here, and inf * 0 is not 0.
    return jnp.where(gate.valid_BT[..., None], hidden_BTM, 0.0), gate


def _router(module: nn.Module, projection: Projection, config: MixtureConfig) -> jax.Array:
    init = nn.initializers.normal(config.router_init_std)
    return module.param(
        "router",
        nn.with_logical_partitioning(init, (projection.adapter_axes[0], "expert")),
        (projection.shape[0], config.num_experts),
    )


def _gate_and_sow(
    module: nn.Module, logits_BTE: jax.Array, config: MixtureConfig, context: AdapterContext
) -> Gate:
    gate = soft_gate(logits_BTE, context.valid_or_all(logits_BTE.shape[:2]), config)
    loss = jnp.float32(0)
    if config.load_balance_loss_weight:
        loss = config.load_balance_loss_weight * load_balance_loss(gate)
    # A weight of 0 sows its 0 as well: the loss is a mean over all routers of the model.
    module.sow("losses", "router", loss)
    if module.is_mutable_collection("metrics"):
        num_tasks = 0 if context.task_ids_BT is None else context.num_tasks
        module.sow("metrics", "router", mixture_stats(gate, context.task_ids_BT, num_tasks))
    return gate

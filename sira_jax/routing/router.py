"""From router logits to gates: softmax, expert dropout, top-k, capacity. Always float32.

Axis letters: G routing groups, S tokens a group, D features in, E experts, K selected experts.
"""

import flax.struct
import jax
import jax.numpy as jnp

from sira_jax.errors import check
from sira_jax.placement import constrain
from sira_jax.routing.capacity import expert_capacity, queue_positions, within_capacity
from sira_jax.routing.config import RoutingConfig
from sira_jax.routing.products import project

# Up to this many experts are ranked by comparing them all, more by `top_k`.
MAX_COMPARED_EXPERTS = 64


@flax.struct.dataclass
class Routing:
    """Where the tokens of each group go. Rows of padding are False or 0 throughout.

    Attributes:
      logits_GSE: float32 router logits, for `router_z_loss`; carries gradients.
      probs_GSE: float32 softmax over all experts, before dropout; carries gradients.
      gates_GSE: float32 combine weights, 0 wherever `kept_GSE` is False; carries gradients.
      selected_GSE: bool, exactly k experts of a valid token (or `active_choices` of `route`): its top k.
      queued_GSE: bool, the selected ones with a gate other than 0: these ask for a place.
      kept_GSE: bool, the queued ones whose place is within capacity.
      position_GSE: int32 place in the expert's queue, from 0; meaningless where not kept.
      indices_GSK: int32, the k best experts, best first; meaningless for padding.
      valid_GS: bool, False for padding.
      capacity: C, the most tokens of a group one expert keeps; at least S where there is no limit.
    """

    logits_GSE: jax.Array
    probs_GSE: jax.Array
    gates_GSE: jax.Array
    selected_GSE: jax.Array
    queued_GSE: jax.Array
    kept_GSE: jax.Array
    position_GSE: jax.Array
    indices_GSK: jax.Array
    valid_GS: jax.Array
    capacity: int = flax.struct.field(pytree_node=False)


def router_logits(x_GSD: jax.Array, router_DE: jax.Array) -> jax.Array:
    """Returns x Wg in float32, (G, S, E), whatever the type of `x_GSD` [S: float32, no bias]."""
    logits_GSE = project(
        x_GSD.astype(jnp.float32),
        router_DE.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return constrain(logits_GSE, "batch", None, None)


def _drop(gates_GSE: jax.Array, rate: float, rng: jax.Array) -> jax.Array:
    kept_GSE = jax.random.bernoulli(rng, 1.0 - rate, gates_GSE.shape)
    return jnp.where(kept_GSE, gates_GSE / (1.0 - rate), 0.0)


def _rank(scores_GSE: jax.Array, num_choices: int) -> jax.Array:
    """Returns each expert's rank in its row, int32 from 0 for the largest; ties to the lower index.

    Ranks below `num_choices` are exact and distinct whatever the ties; others are at least that.
    """
    num_experts = scores_GSE.shape[-1]
    index_E = jnp.arange(num_experts)
    if num_experts <= MAX_COMPARED_EXPERTS:
        # Counting the experts that come first, E comparisons a gate, is one vectorised loop on CPU,
        # 7 times faster than `top_k` for 16 experts; as one (S, E, E) array it would be stored.
        rank_GSE = jnp.zeros(scores_GSE.shape, jnp.int32)
        for other in range(num_experts):
            other_GS1 = scores_GSE[..., other : other + 1]
            is_tie_won_GSE = (other_GS1 == scores_GSE) & (other < index_E)
            rank_GSE += (other_GS1 > scores_GSE) | is_tie_won_GSE
        return rank_GSE
    _, indices_GSK = jax.lax.top_k(scores_GSE, num_choices)
    is_choice_GSKE = indices_GSK[..., None] == index_E
    ranks_K1 = jnp.arange(num_choices)[:, None]
    return num_choices + jnp.sum(is_choice_GSKE * (ranks_K1 - num_choices), axis=2)


def route(
    logits_GSE: jax.Array,
    valid_GS: jax.Array,
    config: RoutingConfig,
    *,
    deterministic: bool,
    rng: jax.Array | None = None,
    active_choices: jax.Array | None = None,
) -> Routing:
    """Selects k experts for every token and applies the capacity of each group.

    p = softmax(logits) over all experts; then expert dropout if "before_topk"; the k largest are
    selected, ties to the lower index; `renormalize`; then expert dropout if "after_topk"; then
    capacity. Dropout zeroes each (token, expert) gate independently with rate q, in training only,
    and scales the others by 1 / (1 - q). An expert whose gate was dropped before the selection can
    still be selected, if fewer than k are left, lower index first: its gate is 0, and a gate of 0
    takes no place in the expert's queue.

    Args:
      logits_GSE: router logits; taken to float32.
      valid_GS: bool, False for padding, which selects nothing and takes no place.
      config: static.
      deterministic: no dropout, and `eval_capacity_factor`.
      rng: key of the dropout; needed in training if `expert_dropout_rate` is over 0.
      active_choices: int scalar from 1 to k that may change from step to step without compiling anew: only so many of the
        k are selected. None is k. The capacity counts k.

    Raises:
      ConfigError: shapes disagree, or the key is missing.
    """
    num_choices = config.num_selected_experts
    check(
        logits_GSE.ndim == 3 and logits_GSE.shape[-1] == config.num_experts,
        "logits_GSE.shape",
        logits_GSE.shape,
        f"(groups, tokens, num_experts={config.num_experts})",
    )
    check(
        valid_GS.shape == logits_GSE.shape[:2],
        "valid_GS.shape",
        valid_GS.shape,
        f"the first two axes of the logits, {logits_GSE.shape[:2]}",
    )
    rate = 0.0 if deterministic else config.expert_dropout_rate
    check(
        rate == 0 or rng is not None,
        "rng",
        rng,
        f"a key, as expert_dropout_rate={rate} and deterministic=False",
    )
    valid_GS = valid_GS.astype(bool)
    valid_GS1 = valid_GS[..., None]

    # Masked before the softmax too, so that no content of padding can reach a gradient as inf * 0.
    logits_GSE = jnp.where(valid_GS1, logits_GSE.astype(jnp.float32), 0.0)
    probs_GSE = jnp.where(valid_GS1, jax.nn.softmax(logits_GSE, axis=-1), 0.0)

    gates_GSE = probs_GSE
    if rate > 0 and config.expert_dropout_position == "before_topk":
        gates_GSE = _drop(gates_GSE, rate, rng)
    rank_GSE = _rank(jax.lax.stop_gradient(gates_GSE), num_choices)
    selected_GSE = (rank_GSE < num_choices) & valid_GS1
    if active_choices is not None:
        selected_GSE &= rank_GSE < active_choices
    gates_GSE = jnp.where(selected_GSE, gates_GSE, 0.0)
    if config.renormalize:
        total_GS1 = jnp.sum(gates_GSE, axis=-1, keepdims=True)
        gates_GSE = gates_GSE / jnp.where(total_GS1 == 0, 1.0, total_GS1)
    if rate > 0 and config.expert_dropout_position == "after_topk":
        gates_GSE = _drop(gates_GSE, rate, rng)

    # `!= 0` and not `> 0`: a gate that is not a number must show in the output, not vanish.
    queued_GSE = selected_GSE & (jax.lax.stop_gradient(gates_GSE) != 0)
    capacity = expert_capacity(logits_GSE.shape[1], config, deterministic=deterministic)
    kept_GSE = within_capacity(rank_GSE, queued_GSE, num_choices, capacity)
    position_GSE = queue_positions(rank_GSE, queued_GSE, num_choices)

    choices_K = jnp.arange(num_choices)[:, None]
    is_choice_GSKE = rank_GSE[:, :, None] == choices_K
    indices_GSK = jnp.sum(is_choice_GSKE * jnp.arange(config.num_experts), axis=-1, dtype=jnp.int32)
    return Routing(
        logits_GSE=logits_GSE,
        probs_GSE=probs_GSE,
        gates_GSE=jnp.where(kept_GSE, gates_GSE, 0.0),
        selected_GSE=selected_GSE,
        queued_GSE=queued_GSE,
        kept_GSE=kept_GSE,
        position_GSE=position_GSE,
        indices_GSK=indices_GSK,
        valid_GS=valid_GS,
        capacity=capacity,
    )

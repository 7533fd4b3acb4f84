"""How many tokens an expert takes from a group, and which ones.

Axis letters: G routing groups, S tokens a group, E experts, K selected experts.
"""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp

from sira_jax.routing.config import RoutingConfig


def expert_capacity(group_size: int, config: RoutingConfig, *, deterministic: bool) -> int:
    """Returns C, the most tokens of a group of `group_size` (padding included) an expert takes.

    C = max(min_capacity, ceil(capacity_factor * k * S / E)) [C: `capacity_counts_k` keeps the k].
    `deterministic` takes `eval_capacity_factor` instead. Without a factor C = S. A C of S or more
    turns no token away, since none selects an expert twice.
    """
    factor = config.eval_capacity_factor if deterministic else config.capacity_factor
    if factor is None:
        return group_size
    choices = config.num_selected_experts if config.capacity_counts_k else 1
    # In fractions of the factor as it is written: 1.1 * 4 * 400 / 16 is 110, and a little more in binary.
    fair_share = math.ceil(Fraction(str(factor)) * choices * group_size / config.num_experts)
    return max(config.min_capacity, fair_share)


def queue_positions(rank_GSE: jax.Array, queued_GSE: jax.Array, num_choices: int) -> jax.Array:
    """Returns every queued token's place in each expert's queue.

    All first choices come in token order, then all second choices, and so on [C, as flaxformer and
    GShard], so under pressure a token loses its weakest experts first. Groups do not interact.

    Args:
      rank_GSE: int, the rank of expert e among the token's choices, 0 for the best.
      queued_GSE: bool, whether the token stands in the expert's queue; its rank is then below
        `num_choices`. Others (padding, experts not selected, gates dropped out) take no place.
      num_choices: choices a token has, k.

    Returns:
      int32 (G, S, E), from 0; 0 where not queued.
    """
    queue_GSKE = _queue_of_choice(rank_GSE, queued_GSE, num_choices).astype(jnp.int32)
    before_GSKE = jnp.cumsum(queue_GSKE, axis=1) - queue_GSKE
    place_GSKE = before_GSKE + _better_choices(queue_GSKE)[:, None]
    return jnp.sum(queue_GSKE * place_GSKE, axis=2)


def within_capacity(
    rank_GSE: jax.Array, queued_GSE: jax.Array, num_choices: int, capacity: int
) -> jax.Array:
    """Returns bool (G, S, E): queued, and `queue_positions` is below `capacity`.

    It needs one prefix sum for all choices together: in an expert's queue there is one choice that
    is cut at some token; all better choices are kept and all worse ones are not.
    """
    if capacity >= rank_GSE.shape[1]:
        return queued_GSE
    queue_GSKE = _queue_of_choice(rank_GSE, queued_GSE, num_choices)
    better_GKE = _better_choices(queue_GSKE)
    # The last choice that still finds a place free: with no place at all it would be choice -1.
    cut_G1E = jnp.sum(better_GKE < capacity, axis=1, keepdims=True) - 1
    is_cut_GKE = jnp.arange(num_choices)[:, None] == cut_G1E
    free_G1E = capacity - jnp.sum(better_GKE * is_cut_GKE, axis=1, keepdims=True)
    in_cut_GSE = queued_GSE & (rank_GSE == cut_G1E)
    taken_GSE = jnp.cumsum(in_cut_GSE.astype(jnp.int32), axis=1)
    return queued_GSE & ((rank_GSE < cut_G1E) | (in_cut_GSE & (taken_GSE <= free_G1E)))


def _queue_of_choice(rank_GSE, queued_GSE, num_choices):
    choices_K1 = jnp.arange(num_choices)[:, None]
    return queued_GSE[:, :, None] & (rank_GSE[:, :, None] == choices_K1)


def _better_choices(queue_GSKE):
    """Returns (G, K, E): how many tokens of the group queue with a better choice."""
    queued_GKE = jnp.sum(queue_GSKE, axis=1, dtype=jnp.int32)
    return jnp.cumsum(queued_GKE, axis=1) - queued_GKE

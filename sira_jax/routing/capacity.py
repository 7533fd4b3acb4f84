"""How many tokens an expert takes from a group, and which ones.

Axis letters: G routing groups, S tokens a group, E experts, K selected experts.
"""

import math

import jax
import jax.numpy as jnp

from sira_jax.routing.config import RoutingConfig


def expert_capacity(group_size: int, config: RoutingConfig, *, deterministic: bool) -> int:
    """Returns C, the most tokens of a group of `group_size` (padding included) an expert takes.

    C = max(min_capacity, ceil(capacity_factor * k * S / E)) [C: `capacity_counts_k` keeps the k].
    `deterministic` takes `eval_capacity_factor` instead. Without a factor C = S, which binds nothing
    since no token selects an expert twice. C may be over S; `is_unlimited` tells.
    """
    factor = config.eval_capacity_factor if deterministic else config.capacity_factor
    if factor is None:
        return group_size
    choices = config.num_selected_experts if config.capacity_counts_k else 1
    fair_share = math.ceil(factor * choices * group_size / config.num_experts)
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
      int32 (G, S, E), from 0; meaningless where not queued.
    """
    choices_K = jnp.arange(num_choices)[:, None]
    queue_GSKE = (queued_GSE[:, :, None] & (rank_GSE[:, :, None] == choices_K)).astype(jnp.int32)
    before_GSKE = jnp.cumsum(queue_GSKE, axis=1) - queue_GSKE
    queued_GKE = jnp.sum(queue_GSKE, axis=1)
    better_choices_GKE = jnp.cumsum(queued_GKE, axis=1) - queued_GKE
    place_GSKE = before_GSKE + better_choices_GKE[:, None]
    return jnp.sum(queue_GSKE * place_GSKE, axis=2)

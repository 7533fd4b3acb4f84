"""Auxiliary losses of a router, unweighted; the weights are in `RoutingConfig`.

Axis letters: G routing groups, S tokens a group, E experts.
"""

import jax
import jax.numpy as jnp

from sira_jax.routing.products import keep
from sira_jax.routing.router import Routing


def _mean_of_valid(values: jax.Array, valid_GS: jax.Array) -> jax.Array:
    # What the backward pass needs of these sums over all devices' tokens is not to be summed once more.
    total, count = keep(jnp.sum(values, axis=(0, 1))), keep(jnp.sum(valid_GS, dtype=jnp.float32))
    # Without a valid token the sum is 0, and so is the mean.
    return total / jnp.maximum(count, 1.0)


def load_balance_loss(routing: Routing) -> jax.Array:
    """Returns E * sum over e of f_e P_e over all valid tokens, a float32 scalar.

    f_e is the share of tokens with expert e in their top k, before capacity, and P_e the mean
    probability of e, before dropout [C, as Switch Transformer, arXiv 2101.03961, eq. 4, and
    flaxformer]. Even routing gives k. Gradients flow through P only. 0 without a valid token.
    """
    share_E = _mean_of_valid(routing.selected_GSE.astype(jnp.float32), routing.valid_GS)
    mean_prob_E = _mean_of_valid(routing.probs_GSE, routing.valid_GS)
    return routing.probs_GSE.shape[-1] * jnp.sum(share_E * mean_prob_E)


def router_z_loss(logits_GSE: jax.Array, valid_GS: jax.Array) -> jax.Array:
    """Returns the mean of logsumexp(logits)^2 over valid tokens, a float32 scalar.

    ST-MoE, arXiv 2202.08906, eq. 5. It keeps the logits small. 0 without a valid token.
    """
    valid_GS = valid_GS.astype(bool)
    logits_GSE = jnp.where(valid_GS[..., None], logits_GSE.astype(jnp.float32), 0.0)
    log_z_GS = jnp.where(valid_GS, jax.nn.logsumexp(logits_GSE, axis=-1), 0.0)
    return _mean_of_valid(jnp.square(log_z_GS), valid_GS)

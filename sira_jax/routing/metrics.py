"""What a router does, as sums that add up exactly over layers, steps and hosts.

Axis letters: G routing groups, S tokens a group, E experts, Z tasks.
"""

import flax.struct
import jax
import jax.numpy as jnp

from sira_jax.errors import check
from sira_jax.routing.router import Routing


@flax.struct.dataclass
class RouterStats:
    """Sums over valid tokens. `a + b` joins two; `summary` divides.

    Means of means would weigh a short batch like a long one, so only sums are kept. All float32,
    exact for counts up to 2**24. Under `jax.lax.scan` a leading layer axis is summed by `reduce`.

    Attributes:
      tokens: valid tokens.
      selected_pairs: (token, expert) pairs in the top k.
      dropped_pairs: those among them that capacity turned away; a gate of 0 is not counted here.
      kept_pairs_E: pairs each expert processed.
      entropy_sum: sum of the entropies of the probabilities, nats.
      confidence_sum: sum of the largest probabilities.
      task_tokens_Z, task_kept_pairs_ZE, task_entropy_sum_Z: the same for each task; Z may be 0.
    """

    tokens: jax.Array
    selected_pairs: jax.Array
    dropped_pairs: jax.Array
    kept_pairs_E: jax.Array
    entropy_sum: jax.Array
    confidence_sum: jax.Array
    task_tokens_Z: jax.Array
    task_kept_pairs_ZE: jax.Array
    task_entropy_sum_Z: jax.Array

    def __add__(self, other: "RouterStats") -> "RouterStats":
        return jax.tree.map(jnp.add, self, other)

    def reduce(self) -> "RouterStats":
        """Sums over the leading axis of every field, e.g. the layers of a scan."""
        return jax.tree.map(lambda field: jnp.sum(field, axis=0), self)

    def summary(self) -> dict[str, jax.Array]:
        """Returns the metrics; shares and means over nothing are 0.

        expert_load (E,): share of the kept pairs each expert processed, sums to 1.
        dropped_share: share of the selected pairs that capacity turned away.
        gate_entropy: mean entropy of the router's probabilities, nats, from 0 to ln E.
        router_confidence: mean of the largest probability, from 1 / E to 1.
        With tasks also task_expert_load (Z, E), task_gate_entropy (Z,) and task_tokens (Z,).
        """
        metrics = {
            "expert_load": _share(self.kept_pairs_E, jnp.sum(self.kept_pairs_E)),
            "dropped_share": _share(self.dropped_pairs, self.selected_pairs),
            "gate_entropy": _share(self.entropy_sum, self.tokens),
            "router_confidence": _share(self.confidence_sum, self.tokens),
        }
        if self.task_tokens_Z.shape[-1]:
            task_pairs_Z1 = jnp.sum(self.task_kept_pairs_ZE, axis=-1, keepdims=True)
            metrics |= {
                "task_expert_load": _share(self.task_kept_pairs_ZE, task_pairs_Z1),
                "task_gate_entropy": _share(self.task_entropy_sum_Z, self.task_tokens_Z),
                "task_tokens": self.task_tokens_Z,
            }
        return metrics


def _share(part: jax.Array, whole: jax.Array) -> jax.Array:
    return part / jnp.maximum(whole, 1.0)


def router_stats(
    routing: Routing, task_ids_GS: jax.Array | None = None, num_tasks: int = 0
) -> RouterStats:
    """Returns the sums over the valid tokens of `routing`, without gradients.

    Args:
      routing: result of `route`.
      task_ids_GS: int, the task of each token, from 0; needed if `num_tasks` is over 0. Ids outside
        of [0, num_tasks) count for no task.
      num_tasks: Z, static.

    Raises:
      ConfigError: tasks are wanted and `task_ids_GS` is missing.
    """
    check(
        num_tasks == 0 or task_ids_GS is not None,
        "task_ids_GS",
        task_ids_GS,
        f"the task of each token, as num_tasks={num_tasks}",
    )
    turned_away_GSE = routing.queued_GSE & ~routing.kept_GSE
    return sum_stats(
        routing.probs_GSE,
        routing.valid_GS,
        routing.kept_GSE,
        selected_pairs=jnp.sum(routing.selected_GSE, dtype=jnp.float32),
        dropped_pairs=jnp.sum(turned_away_GSE, dtype=jnp.float32),
        task_ids_GS=task_ids_GS,
        num_tasks=num_tasks,
    )


def sum_stats(
    probs_GSE: jax.Array,
    valid_GS: jax.Array,
    pairs_GSE: jax.Array,
    *,
    selected_pairs: jax.Array,
    dropped_pairs: jax.Array,
    task_ids_GS: jax.Array | None = None,
    num_tasks: int = 0,
) -> RouterStats:
    """The sums of RouterStats, without gradients, from what a router of any kind did.

    Args:
      probs_GSE: its probabilities, 0 in rows of padding.
      valid_GS: bool, False for padding.
      pairs_GSE: what each token gives to each expert of its pairs; True counts as 1.
      selected_pairs, dropped_pairs: see RouterStats.
      task_ids_GS, num_tasks: see `router_stats`.
    """
    probs_GSE, pairs_GSE = jax.lax.stop_gradient((probs_GSE, pairs_GSE))
    pairs_GSE, valid_GS = pairs_GSE.astype(jnp.float32), valid_GS.astype(jnp.float32)
    entropy_GS = jnp.sum(jax.scipy.special.entr(probs_GSE), axis=-1)
    if num_tasks:
        task_GSZ = jax.nn.one_hot(task_ids_GS, num_tasks) * valid_GS[..., None]
    else:
        task_GSZ = jnp.zeros((*valid_GS.shape, 0))
    return RouterStats(
        tokens=jnp.sum(valid_GS),
        selected_pairs=selected_pairs,
        dropped_pairs=dropped_pairs,
        kept_pairs_E=jnp.sum(pairs_GSE, axis=(0, 1)),
        entropy_sum=jnp.sum(entropy_GS),
        confidence_sum=jnp.sum(jnp.max(probs_GSE, axis=-1)),
        task_tokens_Z=jnp.sum(task_GSZ, axis=(0, 1)),
        task_kept_pairs_ZE=jnp.einsum("gsz,gse->ze", task_GSZ, pairs_GSE, precision="highest"),
        task_entropy_sum_Z=jnp.einsum("gsz,gs->z", task_GSZ, entropy_GS, precision="highest"),
    )


def router_metrics(
    routing: Routing, task_ids_GS: jax.Array | None = None, num_tasks: int = 0
) -> dict[str, jax.Array]:
    """Returns the metrics of one routing, `router_stats(...).summary()`."""
    return router_stats(routing, task_ids_GS, num_tasks).summary()

"""Router statistics as metrics that T5X merges over steps and hosts; the names are those of native training."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics


def router_metrics(sums: Mapping[str, jax.Array]) -> dict[str, clu_metrics.Metric]:
    """Metrics from `training.train_step.router_sums`; empty from nothing.

    Each is a quotient of sums, so that what T5X writes is exact over all steps since it last wrote. The names and the values
    of one step are those of `router_summary`: router/dropped_share, router/gate_entropy, router/confidence and
    router/expert_load/NNN.
    """
    if not sums:
        return {}

    def quotient(total, count):
        # As a quotient of 0 by 0 is 0 in `router_summary`.
        return clu_metrics.Average(total=total, count=jnp.maximum(count, 1.0))

    metrics = {
        "router/dropped_share": quotient(sums["dropped_pairs"], sums["selected_pairs"]),
        "router/gate_entropy": quotient(sums["entropy_sum"], sums["tokens"]),
        "router/confidence": quotient(sums["confidence_sum"], sums["tokens"]),
    }
    kinds = [name for name in sums if name.startswith("kept_pairs_")]
    for name in kinds:
        pairs_E = sums[name]
        place = "router/expert_load" if len(kinds) == 1 else f"router/expert_load_of_{len(pairs_E)}"
        metrics |= {
            f"{place}/{expert:03d}": quotient(pairs, jnp.sum(pairs_E))
            for expert, pairs in enumerate(pairs_E)
        }
    return metrics

"""Evaluation: teacher-forced loss per task, decoding, and what the routers do per layer and per task.

Axis letters: B batch, T length, L layers, E experts, Z tasks.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sira_jax.adapters.base import ADAPTER, split_layer
from sira_jax.models import Model
from sira_jax.routing import RouterStats
from sira_jax.training.partitioning import BatchLayout, placed, replicated
from sira_jax.training.train_state import merge_params
from sira_jax.training.train_step import Batch, token_losses


class LossEvaluator:
    """Mean loss and accuracy on a fixed set of batches, over all target tokens and for each task.

    Args:
      model: decoder; its `num_tasks` is the number of names, or 0 where it has no router.
      frozen: parameters of the base.
      batches: the batches of one pass, as the input pipeline makes them, `task_ids` indexing `task_names`.
      task_names: names of the tasks.
      prefix: put before the metrics' names.
      loss_chunk_size: see TrainConfig.
      layout: where the batches go, whose rows are then this process's; None for the default device.
    """

    def __init__(
        self,
        model: Model,
        frozen: Any,
        batches: Sequence[Mapping[str, np.ndarray]],
        task_names: Sequence[str],
        *,
        prefix: str = "validation",
        loss_chunk_size: int = 0,
        layout: BatchLayout | None = None,
    ):
        self._frozen, self._batches, self._layout = frozen, batches, layout
        self._names, self._prefix = list(task_names), prefix
        step = functools.partial(_eval_step, model, len(self._names), loss_chunk_size)
        if layout is None:
            self._step = jax.jit(step)
        else:
            self._step = jax.jit(
                placed(step, layout.mesh, layout.rules), out_shardings=replicated(layout.mesh)
            )

    def __call__(self, adapter: Any) -> dict[str, float]:
        """Returns prefix/loss and prefix/accuracy, and the same followed by /task for each task that has targets."""
        return self.run(adapter)[0]

    def run(self, adapter: Any) -> tuple[dict[str, float], dict[str, Any]]:
        """Returns the metrics and the router report (see `router_report`; empty without routers)."""
        sums, sown = None, None
        for batch in self._batches:
            batch = batch if self._layout is None else self._layout.put(batch)
            new_sums, new_sown = jax.device_get(self._step(adapter, self._frozen, batch))
            # In float64 on the host, so that a long pass loses no digits.
            new_sums = {name: np.asarray(x, np.float64) for name, x in new_sums.items()}
            sums = new_sums if sums is None else {n: sums[n] + new_sums[n] for n in sums}
            sown = new_sown if sown is None else jax.tree.map(np.add, sown, new_sown)
        return self._metrics(sums), router_report(sown or {}, self._names)

    def _metrics(self, sums: Mapping[str, np.ndarray] | None) -> dict[str, float]:
        if sums is None:
            return {}
        metrics = {}
        weights_Z = sums["weight"]
        for name in ("loss", "accuracy"):
            total = sums[name].sum() / max(weights_Z.sum(), 1.0)
            metrics[f"{self._prefix}/{name}"] = float(total)
            if len(self._names) > 1:
                for task, value, weight in zip(self._names, sums[name], weights_Z, strict=True):
                    if weight > 0:
                        metrics[f"{self._prefix}/{name}/{task}"] = float(value / weight)
        return metrics


def _eval_step(
    model: Model, num_tasks: int, chunk_size: int, adapter: Any, frozen: Any, batch: Batch
) -> tuple[dict[str, jax.Array], Any]:
    """Sums over target tokens by task, each (Z,), and what the routers sowed."""
    params = merge_params(adapter, frozen)
    features_BTD, sown = model.apply(
        {"params": params}, batch, method="features", mutable=["metrics"]
    )
    nats_BT, right_BT = token_losses(model, params, features_BTD, batch, chunk_size)

    def by_task(values_BT):
        return jax.ops.segment_sum(
            values_BT.reshape(-1), batch["task_ids"].reshape(-1), num_segments=num_tasks
        )

    sums = {
        "loss": by_task(nats_BT),
        "accuracy": by_task(right_BT),
        "weight": by_task(batch["decoder_loss_weights"].astype(jnp.float32)),
    }
    return sums, sown.get("metrics", {})


def router_report(sown: Mapping[str, Any], task_names: Sequence[str]) -> dict[str, Any]:
    """What the routers did, as plain data: projection path -> statistics, each with a leading axis of layers.

    For "attention/q": expert_load (L, E), gate_entropy (L,) in nats, dropped_share (L,), router_confidence (L,), and with
    several tasks task_expert_load (L, Z, E), task_gate_entropy (L, Z). Under the key "tasks" stand the tasks' names.
    A router of a whole block is called "block". With an encoder, the paths begin with "encoder" or "decoder". Without
    routers the report is empty. With a set of adapters the paths begin with the adapter's name: "NAME/attention/q".
    """

    def is_stats(x):
        return isinstance(x, RouterStats)

    layers: dict[str, dict[int, RouterStats]] = {}
    for path, stats in jax.tree_util.tree_leaves_with_path(sown, is_leaf=is_stats):
        if not is_stats(stats):
            continue
        names = tuple(str(entry.key) for entry in path if hasattr(entry, "key"))
        at = names.index(ADAPTER)
        prefix, layer, inner = split_layer(names[:at])
        # A router of the whole block stands at no projection.
        projection = "/".join([*names[at + 1 : -1], *prefix, *(inner or ["block"])])
        if layer is None:
            count = stats.tokens.shape[0]
            for layer in range(count):
                one = jax.tree.map(lambda x, layer=layer: x[layer], stats)
                layers.setdefault(projection, {})[layer] = one
        else:
            layers.setdefault(projection, {})[layer] = stats
    if not layers:
        return {}
    report: dict[str, Any] = {"tasks": list(task_names), "projections": {}}
    for projection, by_layer in layers.items():
        summaries = [jax.device_get(by_layer[layer].summary()) for layer in sorted(by_layer)]
        report["projections"][projection] = {
            name: np.stack([summary[name] for summary in summaries]).tolist()
            for name in summaries[0]
        }
    return report

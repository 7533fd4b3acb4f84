"""What the routers of a model do on batches that are labelled in many ways."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from scripts import router_labels
from sira_jax.models import Model
from sira_jax.training.evaluate import router_report
from sira_jax.training.logging import Progress
from sira_jax.training.train_state import merge_params

Statistics = Mapping[str, Mapping[str, np.ndarray]]
# Of one forward pass: each has counts of its own for every router.
_MOST_LABELLINGS = 8


class RouterPasses:
    """Statistics of all routers under many labellings of the same batches, with a bar of the passes.

    Routers do not see labels, so that one forward pass serves several labellings.

    Args:
      model: which counts `count` labels.
      frozen: parameters of the base.
      count: of labels.
      batches: how many there are.
      labellings: how many will be measured.
    """

    def __init__(self, model: Model, frozen: Any, count: int, batches: int, labellings: int):
        self._model, self._frozen, self._count = model, frozen, count
        self._step = jax.jit(self._sow)
        self._bar = Progress(batches * labellings, description="routers", unit="batch")

    def __enter__(self) -> "RouterPasses":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def run(
        self, labellings: Mapping[Any, Sequence[router_labels.Batch]], adapter: Any
    ) -> dict[Any, Statistics]:
        """Statistics (see `router_report`) by projection, for each labelling; empty where nothing routes."""
        found: dict[Any, Statistics] = {}
        names = list(labellings)
        for start in range(0, len(names), _MOST_LABELLINGS):
            keys = names[start : start + _MOST_LABELLINGS]
            sown = None
            for batch, labels in router_labels.stack_labels([labellings[key] for key in keys]):
                new = jax.device_get(self._step(adapter, self._frozen, batch, labels))
                sown = new if sown is None else jax.tree.map(np.add, sown, new)
                self._bar.update(count=len(keys))
            for at, key in enumerate(keys):
                one = jax.tree.map(lambda leaf, at=at: leaf[at], sown or {})
                found[key] = self._statistics(one)
        return found

    def _sow(self, adapter: Any, frozen: Any, batch: router_labels.Batch, labels: Any) -> Any:
        params = merge_params(adapter, frozen)

        def under(own: router_labels.Batch) -> Any:
            _, sown = self._model.apply(
                {"params": params}, {**batch, **own}, method="features", mutable=["metrics"]
            )
            return sown.get("metrics", {})

        # What does not depend on the labels is computed once.
        return jax.vmap(under)(labels)

    def _statistics(self, sown: Any) -> Statistics:
        report = router_report(sown, range(self._count))
        return {
            name: {field: np.asarray(values) for field, values in statistics.items()}
            for name, statistics in report.get("projections", {}).items()
        }

"""How far a merged model is from the adapted one, and the norms that some merges need.

Axis letters: B batch, T length, L layers, V vocabulary.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sira_jax.adapters.reslora import SQUARED_NORM
from sira_jax.adapters.trees import by_layer, by_projection
from sira_jax.errors import MergeError
from sira_jax.models import Model
from sira_jax.training.train_step import Batch


def merge_error(model: Model, params: Any, merged_params: Any, batch: Batch) -> dict[str, float]:
    """What merging changed, on the logits of a batch's valid tokens.

    Args:
      model: decoder with the adapter.
      params: all its parameters.
      merged_params: those of the plain model, from `adapters.merge` or `adapters.reslora.merge_with_inputs`.
      batch: as `Decoder` takes it.

    Returns:
      max_abs_difference: largest |merged - adapted| of a logit.
      relative_difference: ||merged - adapted|| / ||adapted||, Frobenius norms over all logits.

      Both are 0 to rounding where a method merges exactly, and the error of the merge where it approximates.
    """
    largest, changed, whole = _differences(model, params, merged_params, batch)
    return {
        "max_abs_difference": float(largest),
        "relative_difference": float(np.sqrt(changed / max(whole, np.finfo(np.float32).tiny))),
    }


@functools.partial(jax.jit, static_argnums=0)
def _differences(model, params, merged_params, batch):
    adapted_BTV = model.apply({"params": params}, batch)
    plain_BTV = model.clone(adapter=None).apply({"params": merged_params}, batch)
    segments_BT = batch.get("decoder_segment_ids", jnp.ones_like(batch["decoder_input_tokens"]))
    valid_BT1 = segments_BT[..., None] > 0
    adapted_BTV = jnp.where(valid_BT1, adapted_BTV, 0.0)
    change_BTV = jnp.where(valid_BT1, plain_BTV - adapted_BTV, 0.0)
    return jnp.max(jnp.abs(change_BTV)), jnp.sum(change_BTV**2), jnp.sum(adapted_BTV**2)


def measure_norms(model: Model, params: Any, batches: Iterable[Batch]) -> dict[str, np.ndarray]:
    """Norms of what a merge by inputs compares: projection name ("attention/q") -> (L,), float64.

    Frobenius norms over the valid tokens of all batches, as `adapters.reslora.merge_with_inputs` takes them.

    Args:
      model: decoder whose adapter sows these norms, such as ResLoRA's with `merge_by="inputs"`.
      params: all its parameters.
      batches: as `Decoder` takes them.

    Raises:
      MergeError: the adapter sows none.
    """
    squares: dict[str, np.ndarray] = {}
    for batch in batches:
        sown = by_projection(jax.device_get(_sown(model, params, batch)))
        # Each sown value is a tuple of one.
        own = {
            path: leaves[SQUARED_NORM][0] for path, leaves in sown.items() if SQUARED_NORM in leaves
        }
        for name, places in by_layer(own).items():
            layers = [own[path] if index is None else own[path][index] for path, index in places]
            squares[name] = squares.get(name, 0.0) + np.asarray(layers, np.float64)
    if not squares:
        raise MergeError(
            "no norms were measured: there are no batches, or the adapter has none to measure (ResLoRA has with"
            " merge_by='inputs' and connection 'input' or 'middle')"
        )
    return {name: np.sqrt(layers) for name, layers in squares.items()}


@functools.partial(jax.jit, static_argnums=0)
def _sown(model, params, batch):
    variables = {"params": params}
    _, sown = model.apply(variables, batch, method="features", mutable=["metrics"])
    return sown.get("metrics", {})

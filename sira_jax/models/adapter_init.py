"""The fresh adapter tree of a model."""

from typing import Any

import flax.linen as nn
import jax

from sira_jax.adapters import is_adapter, partition


def fresh_adapter(model: nn.Module, key: jax.Array) -> dict[str, Any]:
    """The fresh adapter tree of a model, float32; empty without an adapter. To be traced, by jax.jit or jax.eval_shape.

    The base is not computed: the compiler drops what is not returned.

    Args:
      model: any of this package's models.
      key: random key.

    Raises:
      ConfigError: the adapter does not fit the model, see `AdapterConfig.check_model`.
    """
    config = model.adapter
    if config is None:
        return {}
    config.check_model(model.config.projections)
    params = model.init(key, model.init_batch())["params"]
    adapter, _ = partition(nn.unbox(params), is_adapter)
    return config.initialise(adapter, jax.random.fold_in(key, 1))

"""The fresh adapter tree of a model."""

from typing import Any

import flax.linen as nn
import jax

from sira_jax.adapters import is_adapter, partition
from sira_jax.errors import ConfigError


def fresh_adapter(model: nn.Module, key: jax.Array) -> dict[str, Any]:
    """The fresh adapter tree of a model, float32; empty without an adapter. To be traced, by jax.jit or jax.eval_shape.

    The base is not computed: the compiler drops what is not returned.

    Args:
      model: any of this package's models.
      key: random key.

    Raises:
      ConfigError: the adapter's targets match no projection of the model.
    """
    config = model.adapter
    if config is None:
        return {}
    params = model.init(key, model.init_batch())["params"]
    adapter, _ = partition(nn.unbox(params), is_adapter)
    if not adapter:
        raise ConfigError(
            f"adapter.targets={config.targets!r} is not allowed: it matches no projection of the model"
        )
    return config.initialise(adapter, jax.random.fold_in(key, 1))

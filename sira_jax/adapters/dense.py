"""The projection that carries an adapter.

Axis letters: B batch, T length, D features in, F features out.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sira_jax.adapters.base import AdapterConfig
from sira_jax.adapters.context import AdapterContext, Projection
from sira_jax.quantized import dequantize, is_quantized
from sira_jax.routing import keep


class AdaptedDense(nn.Module):
    """A frozen projection y = x W0 (+ bias) with an optional adapter.

    Attributes:
      features: F.
      adapter: config of the adapter of this very projection (see `AdapterConfig.for_projection`), or None.
      use_bias: adds a bias (F,).
      dtype: type of the computation.
      param_dtype: type of kernel and bias.
      kernel_axes: logical axis names of the kernel's two axes.
      path: where the projection is in its block, "attention/q".
    """

    features: int
    adapter: AdapterConfig | None = None
    use_bias: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel_axes: tuple[str, str] = ("embed", "mlp")
    path: str = ""

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: AdapterContext) -> jax.Array:
        """Projects (B, T, D) to (B, T, F)."""
        kernel_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        held = self.param(
            "kernel",
            nn.with_logical_partitioning(kernel_init, self.kernel_axes),
            (x_BTD.shape[-1], self.features),
            self.param_dtype,
        )
        bias_F = None
        if self.use_bias:
            bias_init = nn.with_logical_partitioning(nn.initializers.zeros, self.kernel_axes[1:])
            bias_F = self.param("bias", bias_init, (self.features,), self.param_dtype)
        projection = Projection(
            self.path,
            dequantize(held),
            bias_F,
            self.dtype,
            self.kernel_axes,
            held if is_quantized(held) else None,
        )
        x_BTD = x_BTD.astype(self.dtype)
        if self.adapter is None:
            return keep(projection(x_BTD))
        return keep(self.adapter.make_module()(x_BTD, projection, context))

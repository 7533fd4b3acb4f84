"""What an adapter's modules are given: the frozen projection, the batch, and what the layer before left.

Axis letters: B batch, T length, D features in, F features out.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from sira_jax import quantized


@dataclasses.dataclass(frozen=True)
class Projection:
    """The frozen projection y = x W0 + b that an adapter sits on.

    Attributes:
      path: where it is in its block, "attention/q".
      kernel_DF: W0, in the type it is held in.
      bias_F: b, or None.
      dtype: type of the computation.
      kernel_axes: logical names of the kernel's two axes.
      held: W0 as it is held where that is in few bits (see `quantized`), or None; `kernel_DF` is then made from it.
    """

    path: str
    kernel_DF: jax.Array
    bias_F: jax.Array | None = None
    dtype: Any = jnp.float32
    kernel_axes: tuple[str, str] = ("embed", "mlp")
    held: Any = None

    @property
    def shape(self) -> tuple[int, int]:
        """(D, F)."""
        return self.kernel_DF.shape

    @property
    def adapter_axes(self) -> tuple[str, str]:
        """Logical names, in an adapter's parameters, of axes as long as the kernel's two: "adapter_mlp" beside "mlp".

        They differ from the kernel's, since what pays for the kernel need not pay for a parameter a thousandth its size.
        """
        return f"adapter_{self.kernel_axes[0]}", f"adapter_{self.kernel_axes[1]}"

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """x W0 + b, (B, T, F)."""
        return self.add_bias(self.product(x_BTD))

    def product(self, x_BTD: jax.Array) -> jax.Array:
        """x W0 without the bias, (B, T, F)."""
        if self.held is not None:
            return quantized.product(x_BTD, self.held)
        return x_BTD @ self.kernel_DF.astype(self.dtype)

    def add_bias(self, y_BTF: jax.Array) -> jax.Array:
        """y + b."""
        return y_BTF if self.bias_F is None else y_BTF + self.bias_F.astype(self.dtype)


@dataclasses.dataclass
class LayerLink:
    """What goes from one layer's adapters to the next layer's, by the path of the projection.

    A module reads `previous[path]` and sets `next[path]`, a tree of the same shapes and types; the first layer finds what
    `AdapterConfig.initial_carry` gave.
    """

    previous: dict[str, Any]
    next: dict[str, Any] = dataclasses.field(default_factory=dict)


@struct.dataclass
class AdapterContext:
    """What an adapter may know of the batch besides its projection's input.

    Attributes:
      valid_BT: True at real tokens, False at padding; None means all are real.
      segment_ids_BT: which of the row's packed examples a token is of, 0 for padding; None means one example a row.
      prompt_BT: True at the tokens of the prompt, which are not to be generated; None means all tokens are.
      task_ids_BT: index of each token's task, for per-task metrics; None means one task.
      progress: share of the training that is done, a float32 scalar from 0 to 1; None outside training.
      adapter_ids_B: which adapter of an `AdapterSet` each row uses, -1 for none; None without such a set.
      block: what the adapter's block module returned for this layer (see `AdapterConfig.make_block_module`), or None.
      link: to the layer before and after; None where the adapter has no carry.
      num_tasks: number of tasks that `task_ids_BT` counts (static; 0 turns per-task metrics off).
      deterministic: True outside training: no dropout of any kind, evaluation capacity (static).
      decoding: True where one call continues another, with a cache (static).
    """

    valid_BT: jax.Array | None = None
    segment_ids_BT: jax.Array | None = None
    prompt_BT: jax.Array | None = None
    task_ids_BT: jax.Array | None = None
    progress: jax.Array | None = None
    adapter_ids_B: jax.Array | None = None
    block: Any = None
    link: LayerLink | None = struct.field(pytree_node=False, default=None)
    num_tasks: int = struct.field(pytree_node=False, default=0)
    deterministic: bool = struct.field(pytree_node=False, default=True)
    decoding: bool = struct.field(pytree_node=False, default=False)

    def valid_or_all(self, shape: tuple[int, int]) -> jax.Array:
        """`valid_BT`, or all True in this shape (B, T)."""
        return jnp.ones(shape, bool) if self.valid_BT is None else self.valid_BT

"""Where activations lie on devices: models name the axes of their arrays, training says what the names mean.

The names are those of the parameters' logical axes ("mlp", "heads") and of activations ("batch"). Without an active
placement, on one device, every function here leaves its arrays as they are.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax

# Of an axis that the compiler may cut as it likes.
FREE = "*"
Names = tuple[str | None, ...]


class Placement(Protocol):
    """What names of axes mean on the devices at hand; `training.partitioning` has the one that is used."""

    def constrain(self, x: jax.Array, names: Names) -> jax.Array:
        """x, laid out by the names of its axes; None is an axis that is not cut, FREE one left to the compiler."""
        ...

    def per_shard(
        self, function: Callable[..., jax.Array], whole: Any, cut: Any, size: int
    ) -> jax.Array:
        """See `per_shard` below."""
        ...


_active: contextvars.ContextVar[Placement | None] = contextvars.ContextVar("placement")


@contextlib.contextmanager
def active(placement: Placement | None) -> Iterator[None]:
    """Holds while a program is traced; None turns an outer one off."""
    token = _active.set(placement)
    try:
        yield
    finally:
        _active.reset(token)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """x, whose axes have these names, laid out on the devices accordingly; its value does not change."""
    placement = _active.get(None)
    return x if placement is None else placement.constrain(x, names)


def per_shard(function: Callable[..., jax.Array], whole: Any, cut: Any, size: int) -> jax.Array:
    """function(whole, cut), computed by each device on its own part of the batch.

    For computations that the compiler would spread over all devices, such as sorting: it must make no difference whether
    `function` sees all groups or some.

    Args:
      function: (whole, cut) -> array with the batch's axis first.
      whole: tree of arrays that every part needs.
      cut: tree of arrays whose first axis is the batch's.
      size: length of that axis.
    """
    placement = _active.get(None)
    if placement is None:
        return function(whole, cut)
    return placement.per_shard(function, whole, cut, size)

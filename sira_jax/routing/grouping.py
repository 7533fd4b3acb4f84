"""Cutting a batch into routing groups and putting it together again.

Axis letters: B batch, T length, G routing groups, S tokens a group, D features in, F features out.
"""

import jax
import jax.numpy as jnp

from sira_jax.errors import check


def group_tokens(
    x_BTD: jax.Array, valid_BT: jax.Array, group_size: int | None
) -> tuple[jax.Array, jax.Array]:
    """Cuts tokens, in row-major order, into groups of `group_size`.

    Args:
      x_BTD: any type; or any per-token array with axes after the second.
      valid_BT: bool, False for padding.
      group_size: S; the last group is filled up with invalid tokens of zeros where S does not
        divide B * T. None makes every sequence a group.

    Returns:
      (x_GSD, valid_GS) with G = ceil(B * T / S).

    Raises:
      ConfigError: `group_size` is below 1 or the shapes disagree.
    """
    check(
        valid_BT.shape == x_BTD.shape[:2],
        "valid_BT.shape",
        valid_BT.shape,
        f"the first two axes of x_BTD, {x_BTD.shape[:2]}",
    )
    if group_size is None:
        return x_BTD, valid_BT.astype(bool)
    check(group_size >= 1, "group_size", group_size, "a whole number over 0, or None")
    num_tokens, features = x_BTD.shape[0] * x_BTD.shape[1], x_BTD.shape[2:]
    num_groups = -(-num_tokens // group_size)
    missing = num_groups * group_size - num_tokens
    x_ND = x_BTD.reshape(num_tokens, *features)
    valid_N = valid_BT.astype(bool).reshape(num_tokens)
    if missing:
        x_ND = jnp.pad(x_ND, [(0, missing)] + [(0, 0)] * len(features))
        valid_N = jnp.pad(valid_N, (0, missing))
    shape = (num_groups, group_size)
    return x_ND.reshape(*shape, *features), valid_N.reshape(shape)


def ungroup(y_GSF: jax.Array, batch: int, length: int) -> jax.Array:
    """Undoes `group_tokens`: returns (batch, length, F), without the filling."""
    features = y_GSF.shape[2:]
    y_NF = y_GSF.reshape(-1, *features)[: batch * length]
    return y_NF.reshape(batch, length, *features)

"""Decoding state in the form that T5X's search functions rearrange: a tree of arrays whose first axis is the rows'.

T5X repeats, picks and reorders rows of the cache by its first axis. Ours has scalars (the next slot), and layers first where
they are scanned.

Axis letters: B rows (prompts, or prompts times beams), T tokens of a call, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from sira_jax.adapters.base import STACKED


def to_rows(cache: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The model's cache with the rows' axis first; numbers that all rows share are repeated for each row."""
    parts: dict[str, dict] = {"shared": {}, "own": {}}
    for path, x in traverse_util.flatten_dict(cache).items():
        stacked = STACKED in path
        if x.ndim == stacked:
            parts["shared"][path] = jnp.broadcast_to(x, (rows, *x.shape))
        else:
            parts["own"][path] = jnp.moveaxis(x, 1, 0) if stacked else x
    return {name: traverse_util.unflatten_dict(flat) for name, flat in parts.items()}


def from_rows(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `to_rows`."""
    flat = {path: x[0] for path, x in traverse_util.flatten_dict(parts["shared"]).items()}
    for path, x in traverse_util.flatten_dict(parts["own"]).items():
        flat[path] = jnp.moveaxis(x, 0, 1) if STACKED in path else x
    return traverse_util.unflatten_dict(flat)


def start(
    module: nn.Module,
    params: Any,
    batch: Mapping[str, jax.Array],
    next_position_B: jax.Array,
    cache_length: int,
) -> dict[str, Any]:
    """Runs the prompts and returns the decoding state of all rows.

    T5X asks for logits after it hands over the prompt's last token, which ran with the prompt here, so that adapters that
    route by the prompt see all of it. The state holds those logits for the first call of `advance`.

    Args:
      module: one of this package's models.
      params: its parameters.
      batch: what its first call of decoding takes; rows of the decoder end in the prompt's last token.
      next_position_B: position of the first token that is generated.
      cache_length: slots.
    """
    features_BTD, variables = module.apply(
        {"params": params}, batch, cache_length=cache_length, method="features", mutable=["cache"]
    )
    logits_BV = module.apply({"params": params}, features_BTD[:, -1], method="logits")
    rows = len(next_position_B)
    return {
        "model": to_rows(variables["cache"], rows),
        "position": next_position_B,
        "logits": logits_BV,
        "is_first": jnp.ones(rows, bool),
    }


def advance(
    module: nn.Module,
    params: Any,
    state: Mapping[str, Any],
    tokens_B1: jax.Array,
    cache_length: int,
) -> tuple[jax.Array, dict[str, Any]]:
    """Feeds one token a row: (logits (B, V), next state).

    Args:
      module: one of this package's models.
      params: its parameters.
      state: of `start`, rearranged in any way, or of this.
      tokens_B1: the tokens; at the first call the prompts' last ones.
      cache_length: slots.
    """
    rows = tokens_B1.shape[0]

    def step(model_cache):
        return module.apply(
            {"params": params, "cache": model_cache},
            {
                "decoder_input_tokens": tokens_B1,
                "decoder_positions": state["position"][:, None],
            },
            cache_length=cache_length,
            mutable=["cache"],
        )

    def first(state):
        return state["logits"], state | {"is_first": jnp.zeros(rows, bool)}

    def later(state):
        logits_B1V, variables = step(from_rows(state["model"]))
        new = state | {
            "model": to_rows(variables["cache"], rows),
            "position": state["position"] + 1,
        }
        return logits_B1V[:, 0], new

    return jax.lax.cond(state["is_first"][0], first, later, dict(state))

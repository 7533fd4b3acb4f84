"""Which mesh axes each logical axis is cut along: the default table and how a config changes it."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sira_jax.errors import check

MESH_AXES = ("data", "fsdp", "tensor", "expert")
Rules = Mapping[str, tuple[str, ...]]

# The base is cut along fsdp and tensor. Of an adapter, the axis that is as long as a cut-up activation is cut as that is
# (A of "down", B of "up"): its gradient then needs no sum over tensor, and the optimizer's work is shared out. The other
# axis is whole: gathering it in each layer, as fsdp does with the base, moves more than its gradient's sum.
# docs/scaling.md has the compiler's counts.
RULES: Rules = MappingProxyType(
    {
        # Of activations. Every device but those along tensor has its own rows.
        "batch": ("data", "fsdp", "expert"),
        # Routing groups while their tokens are with the experts (dispatch "einsum" alone).
        "expert_batch": ("data", "fsdp"),
        # Of the base, and of activations between its projections.
        "embed": ("fsdp",),
        "heads": ("tensor",),
        "kv_heads": ("tensor",),
        "mlp": ("tensor",),
        "vocab": ("tensor",),
        # Of adapters and routers.
        "expert": ("expert",),
        "adapter_embed": (),
        "adapter_heads": ("tensor",),
        "adapter_kv_heads": ("tensor",),
        "adapter_mlp": ("tensor",),
        "rank": (),
        # Never worth cutting.
        "norm": (),
        "layers": (),
    }
)


def freeze_rules(field: str, rules: Any) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Pairs of a logical axis and the mesh axes it is cut along, from pairs or a mapping.

    Mesh axes are a name, several, or None for none.

    Raises:
      ConfigError: `rules` is no such thing, or a name is not known; it names the field.
    """
    pairs = tuple(rules.items()) if isinstance(rules, Mapping) else rules
    are_pairs = isinstance(pairs, list | tuple) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
    )
    check(are_pairs, field, rules, "pairs of a logical axis and mesh axes")
    frozen = []
    for name, axes in pairs:
        is_known = isinstance(name, str) and name in RULES
        check(is_known, field, name, f"logical axes are {', '.join(RULES)}")
        axes = () if axes is None else (axes,) if isinstance(axes, str) else axes
        is_listed = isinstance(axes, list | tuple) and all(axis in MESH_AXES for axis in axes)
        check(
            is_listed and len(set(axes)) == len(axes),
            f"{field}[{name!r}]",
            axes,
            f"None or different ones of {', '.join(MESH_AXES)}",
        )
        frozen.append((name, tuple(axes)))
    names = [name for name, _ in frozen]
    check(len(set(names)) == len(names), field, names, "each logical axis once")
    return tuple(frozen)


def with_changes(changes: tuple[tuple[str, tuple[str, ...]], ...]) -> Rules:
    """The default table with the changes of `freeze_rules`."""
    return RULES | dict(changes)

"""One array of a parameter tree and where a checkpoint has it, and all of a model's together.

Axis letters: L layers.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of the parameter tree and the tensors it is made of.

    Attributes:
      path: keys down the tree.
      shape: of the array, with the leading L if `stacked`.
      names: Hugging Face names: one a layer if `stacked`, else a single one.
      stacked: the tensors are laid along axis 0.
      transposed: each tensor is stored as (out, in) and held as (in, out).
    """

    path: Path
    shape: tuple[int, ...]
    names: tuple[str, ...]
    stacked: bool
    transposed: bool

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each tensor in the checkpoint."""
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a checkpoint of a model holds.

    Attributes:
      leaves: every leaf of the parameters, in the order of a checkpoint.
      optional: name -> shape of tensors that may be there and are passed over.
      aliases: name -> other names, one of which may hold a tensor that is missing under its own.
      ignored_suffix: tensors whose names end so are passed over whatever their shape; "" for none.
    """

    leaves: list[Leaf]
    optional: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    ignored_suffix: str = ""

    def stored_in(self, names: Collection[str]) -> "Layout":
        """The same with the names that a checkpoint of the tensors `names` has."""

        def own(name: str) -> str:
            others = self.aliases.get(name, ())
            return next((found for found in (name, *others) if found in names), name)

        leaves = [
            dataclasses.replace(leaf, names=tuple(own(name) for name in leaf.names))
            for leaf in self.leaves
        ]
        return dataclasses.replace(self, leaves=leaves)

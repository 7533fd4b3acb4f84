"""What adapters and files need to know of a model's layers, whatever the model: its stacks of equal blocks."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Stack:
    """Equal blocks, one after another.

    Attributes:
      prefix: where its layers are in the parameter tree: () for a decoder-only model ("layers" or "layers_0"... at the
        root), ("encoder",) for those of an encoder.
      num_layers: blocks.
      projections: path of each projection that may carry an adapter -> (d_in, d_out), in the order they are computed.
        The path is the one in the block, "attention/q", after the prefix: "encoder/attention/query".
    """

    prefix: tuple[str, ...]
    num_layers: int
    projections: dict[str, tuple[int, int]]

"""Makes tests/scripts/hlo/sharded_scan.txt and .json: a small program for eight devices and the compiler's own counts of it.

python -m tests.scripts.make_hlo
"""

import json
import os
import re
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

LAYERS, ROWS, WIDTH = 5, 32, 64


def loss(weights_LDD, x_BD):
    """A scan of five layers, whose gradient is a second loop."""

    def layer(x_BD, weight_DD):
        return jnp.tanh(x_BD @ weight_DD), x_BD.sum()

    x_BD, sums_L = jax.lax.scan(layer, x_BD, weights_LDD)
    return x_BD.sum() + sums_L.sum()


def main() -> None:
    """Compiles and writes."""
    mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))

    def shape(dims, *axes):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(dims, jnp.float32, sharding=sharding)

    weights = shape((LAYERS, WIDTH, WIDTH), None, "fsdp", "tensor")
    compiled = jax.jit(jax.grad(loss)).lower(weights, shape((ROWS, WIDTH), "fsdp")).compile()
    # Without the tables of source files, which name this machine's paths.
    text = re.sub(r"\n(File|Function|Stack)\w+\n(\d+ .*\n)+", "\n", compiled.as_text())
    text = re.sub(r" stack_frame_id=\d+", "", text)
    folder = Path(__file__).parent / "hlo"
    (folder / "sharded_scan.txt").write_text(text)
    found = compiled.cost_analysis()
    counts = {name: found[name] for name in ("flops", "bytes accessed", "transcendentals")}
    (folder / "sharded_scan.json").write_text(json.dumps(counts, indent=1) + "\n")


if __name__ == "__main__":
    main()

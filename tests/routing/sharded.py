"""Routed layer with its groups on four devices; run as a module by `test_dispatch.py`."""

import dataclasses

import jax
import numpy as np

from sira_jax.routing import RoutingConfig
from tests.routing.helpers import ALGORITHMS, assert_close, layer_and_gradients, make_layer


def main():
    jax.config.update("jax_num_cpu_devices", 4)
    mesh = jax.make_mesh(
        (4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices("cpu")
    )
    rows = jax.NamedSharding(mesh, jax.P("data"))
    everywhere = jax.NamedSharding(mesh, jax.P())
    config = RoutingConfig(
        num_experts=4, num_selected_experts=2, capacity_factor=0.7, min_capacity=1
    )
    arrays, valid = make_layer(config, 8, 6, 5, 7, 2)
    sharded = {
        name: jax.device_put(value, rows if name in ("x", "cotangent") else everywhere)
        for name, value in arrays.items()
    }
    for algorithm in ALGORITHMS:
        chosen = dataclasses.replace(config, dispatch=algorithm)
        delta, routing, gradients = layer_and_gradients(
            sharded, jax.device_put(valid, rows), chosen, weights=(0.3, 0.2)
        )
        expected = layer_and_gradients(arrays, valid, chosen, weights=(0.3, 0.2))
        assert len(delta.sharding.device_set) == 4
        np.testing.assert_array_equal(routing.kept_GSE, expected[1].kept_GSE)
        assert_close(delta, expected[0])
        jax.tree.map(assert_close, gradients, expected[2])
        print(algorithm)


if __name__ == "__main__":
    main()

"""Random layers and comparisons shared by the tests of routing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sira_jax.routing import load_balance_loss, mix_experts, route, router_z_loss
from tests.quick import QUICK_COMPILE

ALGORITHMS = ("einsum", "masked", "ragged")


def make_layer(config, groups, tokens, d_in, d_out, rank, *, seed=0, valid_share=0.8):
    """Returns (arrays, valid): x, router, A, B and a cotangent in float32 as a dict."""
    rng = np.random.default_rng(seed)
    experts = config.num_experts

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    arrays = {
        "x": normal(groups, tokens, d_in),
        "router": normal(d_in, experts) * 1.5 / np.sqrt(d_in, dtype=np.float32),
        "lora_a": normal(experts, d_in, rank),
        "lora_b": normal(experts, rank, d_out),
        "cotangent": normal(groups, tokens, d_out),
    }
    return arrays, rng.random((groups, tokens)) < valid_share


quick_jit = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
quick_route = quick_jit(route, static_argnames=("config", "deterministic"))


@functools.partial(quick_jit, static_argnames=("config", "deterministic", "weights"))
def layer_and_gradients(
    arrays, valid, config, *, deterministic=False, rng=None, weights=(0.0, 0.0), scale=1.5
):
    """Returns (delta, routing, gradients) of sum(delta * cotangent) + weighted losses."""

    def loss(trained):
        delta, routing = mix_experts(
            trained["x"],
            valid,
            trained["router"],
            trained["lora_a"],
            trained["lora_b"],
            config,
            scale=scale,
            deterministic=deterministic,
            rng=rng,
        )
        total = jnp.sum(delta.astype(jnp.float32) * arrays["cotangent"])
        total += weights[0] * load_balance_loss(routing)
        total += weights[1] * router_z_loss(routing.logits_GSE, valid)
        return total, (delta, routing)

    trained = {name: value for name, value in arrays.items() if name != "cotangent"}
    gradients, (delta, routing) = jax.grad(loss, has_aux=True)(trained)
    return delta, routing, gradients


def assert_close(actual, desired, tolerance=2e-5, name=""):
    """Compares up to `tolerance` of the largest desired value, the scale of rounding in a sum."""
    actual, desired = np.asarray(actual, np.float64), np.asarray(desired, np.float64)
    assert actual.shape == desired.shape, (name, actual.shape, desired.shape)
    assert np.isfinite(actual).all(), name
    bound = tolerance * max(1.0, np.abs(desired).max(initial=0.0))
    np.testing.assert_allclose(actual, desired, rtol=0, atol=bound, err_msg=name)


def assert_matches_reference(arrays, valid, config, reference, **options):
    """Checks values, decisions and gradients of `config.dispatch` against the loops."""
    tolerance = options.pop("tolerance", 2e-5)
    delta, routing, gradients = layer_and_gradients(arrays, valid, config, **options)
    np.testing.assert_array_equal(routing.selected_GSE, reference.selected)
    np.testing.assert_array_equal(routing.kept_GSE, reference.kept)
    kept = reference.kept
    np.testing.assert_array_equal(np.asarray(routing.position_GSE)[kept], reference.position[kept])
    assert routing.capacity == reference.capacity
    for index, chosen in reference.choices.items():
        assert routing.indices_GSK[index].tolist() == chosen
    assert_close(routing.probs_GSE, reference.probs, name="probs")
    assert_close(routing.gates_GSE, reference.gates, name="gates")
    assert_close(delta, reference.delta, tolerance, "delta")
    for name, desired in (
        ("x", reference.grad_x),
        ("router", reference.grad_router),
        ("lora_a", reference.grad_a),
        ("lora_b", reference.grad_b),
    ):
        assert_close(gradients[name], desired, tolerance, f"gradient of {name}")

"""A and the router in one product: values and gradients against float64, for both types of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sira_jax.routing import can_join, project_with_router
from sira_jax.routing.joined import split

N, D, M, E = 24, 40, 8, 5


def draw(dtype):
    rng = np.random.default_rng(0)
    x, weights, router = (rng.normal(size=shape) for shape in ((2, N // 2, D), (D, M), (D, E)))
    # Tokens far from 1: an error that is absolute would show.
    x = jnp.asarray(8 * x, dtype)
    d_hidden, d_logits = rng.normal(size=(2, N // 2, M)), rng.normal(size=(2, N // 2, E))
    arrays = (weights, router, d_hidden, d_logits)
    return x, *(jnp.asarray(array, jnp.float32) for array in arrays)


def exact(x, weights, router, d_hidden, d_logits):
    """Everything in float64, tokens on one axis."""
    x, weights, router, d_hidden, d_logits = (
        np.asarray(a, np.float64).reshape(-1, a.shape[-1])
        for a in (x, weights, router, d_hidden, d_logits)
    )
    return {
        "hidden": x @ weights,
        "logits": x @ router,
        "d_x": d_hidden @ weights.T + d_logits @ router.T,
        "d_weights": x.T @ d_hidden,
        "d_router": x.T @ d_logits,
    }


def computed(x, weights, router, d_hidden, d_logits):
    outputs, pull = jax.vjp(project_with_router, x, weights, router)
    assert all(y.dtype == jnp.float32 for y in outputs)
    d_x, d_weights, d_router = pull((d_hidden, d_logits))
    assert d_x.dtype == x.dtype
    assert d_weights.dtype == d_router.dtype == jnp.float32
    found = dict(zip(("hidden", "logits"), outputs, strict=True))
    found |= {"d_x": d_x, "d_weights": d_weights, "d_router": d_router}
    return {name: np.asarray(a, np.float64).reshape(-1, a.shape[-1]) for name, a in found.items()}


def relative(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


def test_bfloat16_tokens():
    arrays = draw(jnp.bfloat16)
    found = computed(*arrays)
    compiled = jax.jit(project_with_router)(*arrays[:3])
    for name, y in zip(("hidden", "logits"), compiled, strict=True):
        # Compiled, the parts must not be taken for nothing.
        np.testing.assert_allclose(y.reshape(N, -1), found[name], rtol=1e-5, atol=1e-5)
    expected = exact(*arrays)
    # The router's side is float32's; a product in bfloat16 would be a thousand times further off.
    assert relative(found["logits"], expected["logits"]) < 1e-6
    assert relative(found["d_router"], expected["d_router"]) < 1e-6
    for name in ("hidden", "d_x", "d_weights"):
        assert relative(found[name], expected[name]) < 6e-3


def test_float32_tokens():
    arrays = draw(jnp.float32)
    found, expected = computed(*arrays), exact(*arrays)
    for name, value in expected.items():
        assert relative(found[name], value) < 2e-6, name


@pytest.mark.parametrize("jitted", [False, True])
def test_parts_add_up_to_float32(jitted):
    x = jnp.asarray(
        np.random.default_rng(1).normal(size=1000) * np.logspace(-20, 20, 1000), "float32"
    )
    parts = (jax.jit(split) if jitted else split)(x)
    assert all(part.dtype == jnp.bfloat16 for part in parts)
    first, second, third = (np.asarray(part, np.float64) for part in parts)
    np.testing.assert_allclose(first + second + third, np.asarray(x), rtol=2**-23)
    # Each part is small against the one before it.
    assert np.all(np.abs(second) <= np.abs(first) * 2**-7)
    assert np.all(np.abs(third) <= np.abs(second) * 2**-7)


def test_types_that_join():
    assert can_join(jnp.dtype("float32"))
    assert can_join(jnp.dtype("bfloat16"))
    assert not can_join(jnp.dtype("float16"))

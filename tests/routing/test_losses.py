import jax
import jax.numpy as jnp
import numpy as np

from sira_jax.routing import RoutingConfig, load_balance_loss, route, router_z_loss
from tests.routing.helpers import assert_close, quick_jit, quick_route
from tests.routing.reference import reference_layer

CONFIG = RoutingConfig(num_experts=5, num_selected_experts=2, capacity_factor=0.5, min_capacity=1)


def losses(logits, valid):
    routing = route(logits, valid, CONFIG, deterministic=False)
    return load_balance_loss(routing), router_z_loss(logits, valid)


def random_logits(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(3, 11, 5)).astype(np.float32), rng.random((3, 11)) < 0.7


def test_values_match_the_loops():
    logits, valid = random_logits()
    zeros = np.zeros
    reference = reference_layer(
        zeros((3, 11, 2)), valid, zeros((2, 5)), zeros((5, 2, 1)), zeros((5, 1, 2)), CONFIG,
        logits=logits, deterministic=False,
    )  # fmt: skip
    balance, z_loss = quick_jit(losses)(logits, valid)
    assert_close(balance, reference.load_balance_loss, 1e-6)
    assert_close(z_loss, reference.router_z_loss, 1e-6)


def test_even_routing_gives_k_and_one_favourite_gives_more():
    # Token t prefers experts t and t + 1 equally: every expert is selected equally often.
    preference = np.array([[np.roll([4.0, 4.0, 0, 0, 0], shift) for shift in range(5)]])
    valid = np.ones((1, 5), bool)
    assert_close(losses(jnp.asarray(preference), valid)[0], 2.0, 1e-6)
    same = np.tile(preference[:, :1], (1, 5, 1))
    assert losses(jnp.asarray(same), valid)[0] > 4.5


def test_counts_the_selected_also_over_capacity():
    logits, valid = random_logits()
    routing = quick_route(logits, valid, CONFIG, deterministic=False)
    assert np.sum(routing.kept_GSE) < np.sum(routing.selected_GSE)
    unlimited = quick_route(logits, valid, CONFIG, deterministic=True)
    assert load_balance_loss(routing) == load_balance_loss(unlimited)


def test_padding_counts_for_nothing():
    logits, valid = random_logits()
    run = quick_jit(jax.value_and_grad(lambda *args: sum(losses(*args))))
    value, gradient = run(logits, valid)
    changed, changed_gradient = run(np.where(valid[..., None], logits, 1e30), valid)
    assert value == changed
    np.testing.assert_array_equal(gradient, changed_gradient)
    np.testing.assert_array_equal(gradient[~valid], 0.0)
    packed = logits[valid][None]
    assert_close(run(packed, np.ones(packed.shape[:2], bool))[0], value, 1e-6)


def test_no_valid_token_gives_zero_values_and_gradients():
    logits, valid = random_logits()
    run = quick_jit(jax.value_and_grad(lambda *args: sum(losses(*args))))
    value, gradient = run(logits, np.zeros_like(valid))
    assert value == 0.0
    np.testing.assert_array_equal(gradient, 0.0)

"""What keeps SiRA's router from a few experts: which regularisers act, and SMoE-dropout's growing k."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sira_jax.adapters import AdaptedDense, AdapterContext, SiRAConfig
from sira_jax.adapters.sira import growing_choices
from sira_jax.models import Decoder
from sira_jax.training.train_state import count_trained, init_adapter
from tests.tiny import decoder_config

B, T, D, F, E, R = 2, 6, 4, 3, 4, 2
FIELDS = {"num_experts": E, "num_selected_experts": 2, "rank": R, "capacity_factor": None}


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)
    shapes = {"router": (D, E), "lora_a": (E, D, R), "lora_b": (E, R, F)}
    adapter = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return {"kernel": rng.normal(size=(D, F)).astype(np.float32), "adapter": adapter}


def random_router(params):
    adapter = dict(params["adapter"])
    adapter["buffer_router"] = adapter.pop("router")
    return params | {"adapter": adapter}


@functools.partial(jax.jit, static_argnums=0)
def apply(config, params, x, context, rngs=None):
    module = AdaptedDense(features=F, adapter=config)
    return module.apply({"params": params}, x, context, rngs=rngs, mutable=["losses", "metrics"])


def loops(x, params, choices):
    """The equation without capacity, k = `choices`, in plain loops."""
    w = np.asarray(params["kernel"], np.float64)
    adapter = {k.removeprefix("buffer_"): v for k, v in params["adapter"].items()}
    router, a, b = (np.asarray(adapter[n], np.float64) for n in ("router", "lora_a", "lora_b"))
    y = np.zeros((B, T, F))
    for i in range(B):
        for t in range(T):
            token = np.asarray(x[i, t], np.float64)
            exps = [math.exp(v) for v in token @ router]
            probs = [v / sum(exps) for v in exps]
            y[i, t] = token @ w
            for e in sorted(range(E), key=lambda e: -probs[e])[:choices]:
                y[i, t] += probs[e] * 8.0 / R * ((token @ a[e]) @ b[e])
    return y


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("none", ("none",)),
        ("smoe_dropout", ("smoe_dropout",)),
        ({"expert_dropout", "load_balance"}, ("load_balance", "expert_dropout")),
        (["expert_dropout", "expert_dropout"], ("expert_dropout",)),
    ],
)
def test_a_name_or_a_set_of_names_in_one_order(given, expected):
    config = SiRAConfig(router_regularizer=given)
    assert config.router_regularizer == expected
    assert SiRAConfig(**{k: v for k, v in config.to_dict().items() if k != "method"}) == config


@pytest.mark.parametrize("name", ["none", "load_balance", "expert_dropout", "smoe_dropout"])
def test_only_what_is_named_acts(x, params, name):
    config = SiRAConfig(
        **FIELDS, router_regularizer=name, load_balance_loss_weight=0.5, expert_dropout_rate=0.5
    )
    context = AdapterContext(deterministic=False, progress=jnp.float32(0.3))
    if name == "smoe_dropout":
        params = random_router(params)
    rngs = {"expert_dropout": jax.random.key(0)}
    y, sown = apply(config, params, x, context, rngs)
    loss = sown["losses"]["adapter"]["router"][0]
    assert (loss != 0) == (name == "load_balance")
    if name == "expert_dropout":
        assert np.abs(y - loops(x, params, 2)).max() > 0.1
    else:
        # At 30 % of the training SMoE-dropout has reached 2 of 4.
        np.testing.assert_allclose(y, loops(x, params, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("progress", "choices"), [(0.0, 1), (0.24, 1), (0.25, 2), (0.5, 3), (0.99, 4), (1.0, 4)]
)
def test_k_grows_linearly_without_compiling_anew(x, params, progress, choices):
    config = SiRAConfig(**FIELDS, router_regularizer="smoe_dropout")
    context = AdapterContext(deterministic=False, progress=jnp.float32(progress))
    assert growing_choices(config, context) == choices
    params = random_router(params)
    y, sown = apply(config, params, x, context)
    np.testing.assert_allclose(y, loops(x, params, choices), rtol=1e-4, atol=1e-5)
    stats = sown["metrics"]["adapter"]["router"][0]
    assert stats.selected_pairs == B * T * choices


@pytest.mark.parametrize("dispatch", ["einsum", "masked", "ragged"])
def test_every_dispatch_grows_alike(x, params, dispatch):
    config = SiRAConfig(**FIELDS, router_regularizer="smoe_dropout", dispatch=dispatch)
    context = AdapterContext(deterministic=False, progress=jnp.float32(0.5))
    params = random_router(params)
    y, _ = apply(config, params, x, context)
    np.testing.assert_allclose(y, loops(x, params, 3), rtol=1e-4, atol=1e-5)


def test_evaluation_takes_all_experts(x, params):
    config = SiRAConfig(**FIELDS, router_regularizer="smoe_dropout")
    params = random_router(params)
    y, _ = apply(config, params, x, AdapterContext())
    np.testing.assert_allclose(y, loops(x, params, E), rtol=1e-4, atol=1e-5)


def test_the_random_router_is_no_trained_parameter():
    config = SiRAConfig(**FIELDS, router_regularizer="smoe_dropout", targets=("q", "down"))
    model = Decoder(decoder_config(), config)
    adapter = init_adapter(model, 0)
    leaves = adapter["layers"]["attention"]["q"]["adapter"]
    assert "router" not in leaves
    assert np.std(leaves["buffer_router"]) > 0
    sizes = [model.config.projections[path] for path in ("attention/q", "mlp/down")]
    assert count_trained(adapter) == 2 * sum(config.count_parameters(*size) for size in sizes)
    trained = SiRAConfig(**FIELDS, targets=("q", "down"))
    assert trained.count_parameters(5, 7) - config.count_parameters(5, 7) == 5 * E

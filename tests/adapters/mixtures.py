"""The soft mixtures' router in plain loops over tokens, written from the equation, and central differences in float64.

Nothing here shares code with the library.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sira_jax.adapters import AdaptedDense, AdapterContext
from tests.tiny import draw, shapes_of

TRAINING = AdapterContext(deterministic=False)


def exact(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def token_gates(token, router, k=None):
    """(probabilities, gates, selected) of one token, lists over the experts."""
    logits = [float(np.dot(token, router[:, e])) for e in range(router.shape[1])]
    exps = [math.exp(v - max(logits)) for v in logits]
    probs = [v / sum(exps) for v in exps]
    best = sorted(range(len(probs)), key=lambda e: -probs[e])[: k or len(probs)]
    selected = [e in best for e in range(len(probs))]
    return probs, [p if s else 0.0 for p, s in zip(probs, selected, strict=True)], selected


def balance(x, router, valid, k=None):
    """The load-balancing loss: E sum f P, f = P without a selection."""
    num_experts = router.shape[1]
    mean_prob, share, tokens = np.zeros(num_experts), np.zeros(num_experts), 0
    for i, t in np.ndindex(valid.shape):
        if valid[i, t]:
            probs, _, selected = token_gates(x[i, t], router, k)
            mean_prob += probs
            share += selected
            tokens += 1
    if k is None:
        share = mean_prob
    return num_experts * float(np.sum(share * mean_prob)) / tokens**2


def differences(function, point):
    """Central differences of a scalar `function(*point)` by every entry of `point`'s leaves, as a tree."""
    leaves, tree = jax.tree.flatten(exact(point))
    slopes = []
    for leaf in leaves:
        slope = np.zeros(leaf.shape)
        for index in np.ndindex(leaf.shape):
            kept, ends = leaf[index], []
            for step in (1e-6, -1e-6):
                leaf[index] = kept + step
                ends.append(function(*jax.tree.unflatten(tree, leaves)))
            leaf[index] = kept
            slope[index] = (ends[0] - ends[1]) / 2e-6
        slopes.append(slope)
    return jax.tree.unflatten(tree, slopes)


@functools.partial(jax.jit, static_argnums=0)
def apply(module, params, x, context, rngs=None):
    return module.apply({"params": params}, x, context, rngs=rngs, mutable=["losses", "metrics"])


def layer(config, features, **options):
    return AdaptedDense(features=features, adapter=config, **options)


def drawn(module, x, seed=0, scale=1.0):
    """All parameters normal: nothing is at its initial value."""
    return draw(shapes_of(module, x, AdapterContext()), seed, scale)


def initialised(module, x, seed=0):
    init = jax.jit(lambda key: nn.unbox(module.init(key, x, AdapterContext())["params"]))
    return jax.device_get(init(jax.random.key(seed)))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def check_gradients(module, reference, params, x, valid, weight=0.0, k=None, tolerance=2e-3):
    """Gradients by parameters and input, of a random projection of the output and the balance loss, against differences.

    `reference(params, x, valid)` is the output in plain loops.
    """
    cotangent = np.random.default_rng(9).normal(size=(*valid.shape, module.features))

    def loss(params, x):
        y, sown = apply(module, params, x, TRAINING.replace(valid_BT=valid))
        return jnp.sum(y * cotangent) + sown["losses"]["adapter"]["router"][0]

    def exact_loss(params, x):
        auxiliary = weight * balance(x, params["adapter"]["router"], valid, k)
        return np.sum(reference(params, x, valid) * cotangent) + auxiliary

    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    wanted = differences(exact_loss, (params, x))
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)

"""What the methods' tests share: a soft mixture's router in plain loops over tokens, central differences in float64, and checks
of what is one low-rank pair.

The references share no code with the library.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sira_jax.adapters import AdaptedDense, AdapterContext, LoRAConfig
from tests.tiny import draw, shapes_of

EVALUATION, TRAINING = AdapterContext(), AdapterContext(deterministic=False)


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


def differences(function, point, step=1e-6):
    """Central differences of a scalar `function(*point)` by every entry of `point`'s leaves, as a tree."""
    leaves, tree = jax.tree.flatten(exact(point))
    slopes = []
    for leaf in leaves:
        slope = np.zeros(leaf.shape)
        for index in np.ndindex(leaf.shape):
            kept, ends = leaf[index], []
            for move in (step, -step):
                leaf[index] = kept + move
                ends.append(function(*jax.tree.unflatten(tree, leaves)))
            leaf[index] = kept
            slope[index] = (ends[0] - ends[1]) / (2 * step)
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


def run(module, params, x, context=EVALUATION, rngs=None):
    """The output alone."""
    return np.asarray(apply(module, params, x, context, rngs)[0])


def dropout_mask(shape, rate, rngs):
    """What dropout on the input of a low-rank pair multiplies x (B, T, D) by, 1 / (1 - rate) or 0.

    LoRA draws from the same stream in the same place, and between identities it shows its mask.
    """
    width = shape[-1]
    probe = layer(LoRAConfig(rank=width, alpha=float(width), dropout_rate=rate), width)
    eye = np.eye(width)
    identity = {"kernel": np.zeros_like(eye), "adapter": {"lora_a": eye, "lora_b": eye}}
    mask = run(probe, identity, np.ones(shape, np.float32), TRAINING, rngs)
    assert 0.0 in mask
    return mask


def check_dropout(config, features, reference, x):
    """Training against `reference(params, x, scale, mask)` under the mask that a pair's dropout draws."""
    rngs = {"dropout": jax.random.key(5)}
    module = layer(config, features)
    params = drawn(module, x)
    wanted = reference(params, x, config.scale, dropout_mask(x.shape, config.dropout_rate, rngs))
    got = run(module, params, x, TRAINING, rngs)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def check_one_lora(config, rank, features, reference, x):
    """`as_lora` is a LoRA of this rank that computes `reference(params, x, scale)`, and so does the merged kernel."""
    params = drawn(layer(config, features), x)
    a, b = config.as_lora(params["adapter"])
    lora = LoRAConfig(rank=rank, alpha=config.scale * rank)
    as_lora = {"kernel": params["kernel"], "adapter": {"lora_a": a, "lora_b": b}}
    wanted = reference(params, x, config.scale)
    np.testing.assert_allclose(run(layer(lora, features), as_lora, x), wanted, rtol=1e-4, atol=1e-4)
    merged = config.merge(params["adapter"], params["kernel"])
    plain = run(AdaptedDense(features=features), {"kernel": merged}, x)
    np.testing.assert_allclose(plain, wanted, rtol=1e-4, atol=1e-4)
    half = params["kernel"].astype(jnp.bfloat16)
    assert config.merge(params["adapter"], half).dtype == "bfloat16"


def check_stacked_merge(config, features, x):
    """Stacked layers merge, and become a LoRA, as each of them does."""
    layers = [drawn(layer(config, features), x, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    merged = config.merge(stacked["adapter"], stacked["kernel"])
    pairs = config.as_lora(stacked["adapter"])
    for at, params in enumerate(layers):
        wanted = config.merge(params["adapter"], params["kernel"])
        np.testing.assert_allclose(merged[at], wanted, rtol=1e-6, atol=1e-6)
        for got, want in zip(pairs, config.as_lora(params["adapter"]), strict=True):
            np.testing.assert_array_equal(got[at], want)

"""The name of a set of parameters: what changes it and what does not."""

import hashlib
import importlib
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sira_jax.checkpoints import fingerprint, load_base_model
from tests.hf_models import TINY_LLAMA, weights_by_rule, write_folder

SHAPE = (3, 5, 4)


def params(dtype="float32") -> dict:
    x = jnp.asarray(np.random.default_rng(0).normal(size=SHAPE), dtype)
    return {"layers": {"q": {"kernel": x}}, "norm": {"scale": jnp.ones(7, dtype)}}


def with_kernel(kernel) -> dict:
    return {**params(), "layers": {"q": {"kernel": jnp.asarray(kernel)}}}


def test_is_64_digits_and_repeats():
    name = fingerprint(params())
    assert len(name) == 64
    assert int(name, 16) >= 0
    assert fingerprint(params()) == name
    reordered = dict(reversed(params().items()))
    assert fingerprint(reordered) == name
    assert fingerprint(jax.tree.map(np.asarray, params())) == name


def test_equals_its_definition_in_plain_integers():
    """Checkpoints hold fingerprints: a change of the algorithm would orphan them all."""

    def mix(x):
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    def leaf_hash(array, seed, multiplier):
        total = 0
        for index in np.ndindex(array.shape):
            position = seed
            for place in index:
                position = mix((position + place) * multiplier % 2**32)
            bits = int.from_bytes(array[index].tobytes(), "little")
            total += mix(bits ^ seed) * (position | 1)
        return total % 2**32

    tree = {
        "b": {"scale": np.arange(4).astype(jnp.bfloat16)},
        "a": {"kernel": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)},
    }
    lines = []
    for path, array in (
        (("a", "kernel"), tree["a"]["kernel"]),
        (("b", "scale"), tree["b"]["scale"]),
    ):
        hashes = [
            leaf_hash(array, 0x6A09E667, 0xBB67AE85),
            leaf_hash(array, 0x3C6EF373, 0xA54FF53B),
        ]
        lines.append(json.dumps([path, array.shape, str(array.dtype), *hashes]))
    assert fingerprint(tree) == hashlib.sha256("\n".join(lines).encode()).hexdigest()


@settings(max_examples=100, deadline=None)
@given(element=st.integers(0, 59), bit=st.integers(0, 31))
def test_one_bit_changes_it(element, bit):
    bits = np.asarray(params()["layers"]["q"]["kernel"]).copy().view(np.uint32)
    bits.reshape(-1)[element] ^= np.uint32(1 << bit)
    assert fingerprint(with_kernel(bits.view(np.float32))) != fingerprint(params())


@settings(max_examples=100, deadline=None)
@given(first=st.integers(0, 59), second=st.integers(0, 59))
def test_swapping_two_elements_changes_it(first, second):
    kernel = np.asarray(params()["layers"]["q"]["kernel"]).copy()
    flat = kernel.reshape(-1)
    flat[[first, second]] = flat[[second, first]]
    assert (fingerprint(with_kernel(kernel)) == fingerprint(params())) == (first == second)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_swapping_layers_rows_or_columns_changes_it(axis):
    kernel = np.asarray(params()["layers"]["q"]["kernel"])
    order = np.arange(SHAPE[axis])
    order[[0, 1]] = order[[1, 0]]
    assert fingerprint(with_kernel(np.take(kernel, order, axis))) != fingerprint(params())


def test_values_that_compare_equal_are_told_apart():
    zeros = np.zeros(SHAPE, np.float32)
    assert fingerprint(with_kernel(zeros)) != fingerprint(with_kernel(-zeros))


def test_names_shapes_and_types_count():
    names = {
        fingerprint(params()),
        fingerprint(params("bfloat16")),
        fingerprint(params("float16")),
        fingerprint({**params(), "more": jnp.zeros(0)}),
        fingerprint({"layers": params()["layers"], "norm2": params()["norm"]}),
        fingerprint(with_kernel(params()["layers"]["q"]["kernel"].reshape(5, 3, 4))),
        fingerprint(with_kernel(params()["layers"]["q"]["kernel"].reshape(1, 3, 5, 4))),
        fingerprint({"norm": params()["norm"]}),
    }
    assert len(names) == 8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_stacked_or_apart_have_one_name(dtype):
    stacked = {
        "layers": {
            "q": {"kernel": jnp.asarray(np.random.default_rng(2).normal(size=(12, 5)), dtype)}
        },
        "norm": {"scale": jnp.ones(7, dtype)},
    }
    kernel = stacked["layers"]["q"]["kernel"]
    # Ten and more: their names do not sort as their numbers do.
    apart = {f"layers_{layer}": {"q": {"kernel": kernel[layer]}} for layer in range(12)}
    apart["norm"] = stacked["norm"]
    assert fingerprint(apart) == fingerprint(stacked)
    swapped = apart | {"layers_3": apart["layers_11"], "layers_11": apart["layers_3"]}
    fewer = {name: layer for name, layer in apart.items() if name != "layers_11"}
    assert len({fingerprint(swapped), fingerprint(fewer), fingerprint(stacked)}) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool"])
def test_parts_are_added_up_whatever_their_size(dtype, monkeypatch):
    x = (np.random.default_rng(1).normal(size=(7, 6)) * 9).astype(jnp.dtype(dtype))
    tree = {"a": jnp.asarray(x), "scalar": jnp.asarray(x[0, 0]), "none": jnp.zeros((0, 3))}
    whole = fingerprint(tree)
    jax.clear_caches()
    # By name: as an attribute of the package, `fingerprint` is the function.
    module = importlib.import_module("sira_jax.checkpoints.fingerprint")
    monkeypatch.setattr(module, "_CHUNK", 12)
    assert fingerprint(tree) == whole
    jax.clear_caches()


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from sira_jax.checkpoints import fingerprint, load_base_model
import sys
mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
model = load_base_model(sys.argv[1])
name = fingerprint(model.params)
print(name)
specs = [P("tensor", "fsdp"), P(None, "tensor")]
for spec in specs:
    def sharding(path, shape, spec=spec):
        axes = [axis if size % 8 == 0 else None for axis, size in zip(spec, shape[1:])]
        return NamedSharding(mesh, P(None, *axes) if path[0] == "layers" else P())
    moved = load_base_model(sys.argv[1], sharding_fn=sharding).params
    for a, b in zip(jax.tree.leaves(model.params), jax.tree.leaves(moved), strict=True):
        assert len(b.sharding.device_set) == 8
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    kernel = moved["layers"]["mlp"]["down"]["kernel"]
    expected = NamedSharding(mesh, P(None, *spec))
    assert kernel.sharding.is_equivalent_to(expected, kernel.ndim), kernel.sharding
    assert fingerprint(moved) == name, spec
    apart = {name: leaf for name, leaf in moved.items() if name != "layers"}
    for layer in range(3):
        apart[f"layers_{layer}"] = jax.tree.map(lambda x: x[layer], moved["layers"])
    assert fingerprint(apart) == name, spec
    changed = dict(moved, final_norm={"scale": moved["final_norm"]["scale"].at[0].add(1)})
    assert fingerprint(changed) != name
embedding = model.params["token_embedder"]["embedding"]
split = jax.device_put(embedding, NamedSharding(mesh, P("fsdp", "tensor")))
assert fingerprint({"e": split}) == fingerprint({"e": embedding})
print("same")
"""


@pytest.mark.slow
def test_sharding_changes_neither_values_nor_the_name(tmp_path):
    path = write_folder(tmp_path, TINY_LLAMA, weights_by_rule(TINY_LLAMA))
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    result = subprocess.run(
        [sys.executable, "-c", SHARDED, str(path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    name, same = result.stdout.split()
    assert same == "same"
    assert fingerprint(load_base_model(path).params) == name

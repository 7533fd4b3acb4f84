"""Relative positions against the published rule in plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sira_jax.models.t5_layers import RelativePositionBias, distance_buckets, relative_buckets
from tests.models.t5_reference import bucket
from tests.tiny_t5 import t5_config


@pytest.mark.parametrize("sizes", [(32, 128), (8, 20), (32, 300), (4, 3)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_are_those_of_the_rule_at_any_distance(sizes, bidirectional):
    offsets = np.arange(-700, 701)
    got = relative_buckets(jnp.asarray(offsets), *sizes, bidirectional=bidirectional)
    expected = [bucket(int(offset), *sizes, bidirectional) for offset in offsets]
    np.testing.assert_array_equal(got, expected)
    assert got.dtype == jnp.int32
    # A key that follows has no distance of 0.
    unused = {sizes[0] // 2} if bidirectional else set()
    assert set(np.asarray(got).tolist()) == set(range(sizes[0])) - unused


def test_buckets_that_float32_gives_as_well():
    """T5 computes the rule in float32; borders at whole powers, such as 16 and 32, must fall alike."""
    exact, buckets = 8, 16
    distances = np.arange(exact, 400)
    logs = np.log(distances.astype(np.float32) / exact + np.finfo(np.float32).eps)
    steps = (logs / np.log(128 / exact) * (buckets - exact)).astype(np.int32)
    expected = np.minimum(exact + steps, buckets - 1)
    table = distance_buckets(buckets, 128)
    np.testing.assert_array_equal(table[np.minimum(distances, 128)], expected)


def test_bias_of_later_queries_is_the_rows_of_the_whole():
    module = RelativePositionBias(t5_config(), bidirectional=False)
    table = np.arange(24, dtype=np.float32).reshape(3, 8)
    params = {"params": {"rel_embedding": table}}
    whole = module.apply(params, 0, 12, 12)
    assert whole.shape == (1, 3, 12, 12)
    for h, t, s in np.ndindex(3, 12, 12):
        assert whole[0, h, t, s] == table[h, bucket(s - t, 8, 8, False)]
    later = jax.jit(lambda start: module.apply(params, start, 3, 12))(jnp.int32(5))
    np.testing.assert_array_equal(later, whole[:, :, 5:8])

import jax.numpy as jnp
import numpy as np
import pytest

from sira_jax.errors import ConfigError
from sira_jax.routing import group_tokens, ungroup


@pytest.mark.parametrize(
    ("size", "groups", "tokens"),
    [(None, 3, 7), (7, 3, 7), (21, 1, 21), (4, 6, 4), (1, 21, 1), (30, 1, 30), (10, 3, 10)],
)
def test_divides_or_pads_and_comes_back(size, groups, tokens):
    x = np.arange(3 * 7 * 2.0).reshape(3, 7, 2) + 1
    valid = np.random.default_rng(0).random((3, 7)) < 0.6
    x_GSD, valid_GS = group_tokens(jnp.asarray(x), valid, size)
    assert x_GSD.shape == (groups, tokens, 2)
    assert valid_GS.shape == (groups, tokens)
    flat, flat_valid = np.reshape(x_GSD, (-1, 2)), np.ravel(valid_GS)
    np.testing.assert_array_equal(flat[:21], x.reshape(-1, 2))
    np.testing.assert_array_equal(flat_valid[:21], valid.ravel())
    assert not flat[21:].any()
    assert not flat_valid[21:].any()
    np.testing.assert_array_equal(ungroup(x_GSD, 3, 7), x)


def test_keeps_the_type_and_takes_arrays_without_features():
    ids, valid = jnp.arange(10, dtype=jnp.int32).reshape(2, 5), np.ones((2, 5))
    ids_GS, valid_GS = group_tokens(ids, valid, 4)
    assert ids_GS.dtype == jnp.int32
    assert valid_GS.dtype == bool
    assert ids_GS.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 0]]
    assert ungroup(ids_GS, 2, 5).tolist() == ids.tolist()


def test_refuses_what_does_not_fit():
    x = jnp.zeros((2, 5, 3))
    with pytest.raises(ConfigError, match="group_size=0"):
        group_tokens(x, np.ones((2, 5), bool), 0)
    with pytest.raises(ConfigError, match=r"valid_BT\.shape"):
        group_tokens(x, np.ones((5, 2), bool), 4)

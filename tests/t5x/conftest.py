"""T5X as the launchers have it: with what JAX dropped put back before anything imports it."""

import os

import jax.experimental.pjit

from sira_jax.t5x_integration.compat import import_t5x, mend_pjit

mend_pjit(jax.experimental.pjit)
# `make test-t5x` sets it: there, a T5X that cannot be used is an error and no reason to skip.
if os.environ.get("REQUIRE_T5X"):
    import_t5x("t5x")

"""The modules of T5X that this package uses. Importing this imports T5X; DependencyError tells how to get it."""

from sira_jax.t5x_integration.compat import import_t5x

checkpoints = import_t5x("t5x.checkpoints")
losses = import_t5x("t5x.losses")
metrics = import_t5x("t5x.metrics")
models = import_t5x("t5x.models")
optimizers = import_t5x("t5x.optimizers")
partitioning = import_t5x("t5x.partitioning")
state_utils = import_t5x("t5x.state_utils")
trainer = import_t5x("t5x.trainer")
utils = import_t5x("t5x.utils")

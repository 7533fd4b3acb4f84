"""From a T5X checkpoint to this package's adapter folder. The way back is the models' `adapter_path`."""

import os
from typing import Any

import jax
from flax import core as flax_core

from sira_jax.adapters import is_adapter, partition
from sira_jax.checkpoints.adapter_file import save_adapter
from sira_jax.checkpoints.fingerprint import fingerprint
from sira_jax.errors import check
from sira_jax.t5x_integration.engine import utils


def export(
    model: Any,
    partitioner: Any,
    restore_checkpoint_cfg: Any,
    output_dir: str,
) -> None:
    """Writes the adapter of a checkpoint as an adapter folder, which scripts/generate.py and the converters read.

    Args:
      model: of `t5x_integration.models`.
      partitioner: T5X's.
      restore_checkpoint_cfg: T5X's, with AdapterCheckpointer.
      output_dir: the folder; made if missing.

    Raises:
      ConfigError: the model has no adapter.
      CheckpointError: the checkpoint does not fit.
    """
    module = model.module
    check(module.adapter is not None, "model.module.adapter", None, "an adapter to export")
    initializer = utils.TrainStateInitializer(
        optimizer_def=None,
        init_fn=model.get_initial_variables,
        input_shapes={},
        partitioner=partitioner,
    )
    restore_checkpoint_cfg.strict = False  # the optimizer state is left out
    state, _ = utils.create_checkpoint_manager_and_restore(
        initializer,
        partitioner,
        restore_checkpoint_cfg,
        restore_checkpoint_cfg.path,
        None,
        use_orbax=False,
    )
    adapter, base = partition(flax_core.unfreeze(state.params), is_adapter)
    name = fingerprint(base)
    if jax.process_index() == 0:
        save_adapter(
            os.fspath(output_dir), module.adapter, jax.device_get(adapter), module.config, name
        )

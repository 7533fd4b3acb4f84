"""Which run may go on from a checkpoint: one of the same config on the same base."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sira_jax.errors import CheckpointError, ConfigError
from sira_jax.training.config import ExperimentConfig, make_experiment

# Fields that a resumed run may change: they steer how long and how often, not what a step computes.
_MAY_CHANGE = {
    "train": {"log_every", "eval_every", "checkpoint_every", "keep_checkpoints"},
    "mesh": None,
    "decode": None,
    "evaluate": None,
    "bad_loss": None,
    "model": {"path", "remat_policy"},
    "adapter": {"dispatch"},
}


def check_resumable(saved: Mapping[str, Any], current: Mapping[str, Any], where: Path) -> None:
    """Raises CheckpointError, naming the field, if a run directory was made by another config."""
    _check_same(saved, current, where, _MAY_CHANGE)


def check_adapter(saved: Mapping[str, Any], experiment: ExperimentConfig, where: Path) -> None:
    """Raises CheckpointError, naming the field, if a checkpoint's adapter computes something else than the config's."""
    may_change = dict.fromkeys(_MAY_CHANGE | saved)
    if experiment.adapter is not None:
        may_change["adapter"] = set(experiment.adapter.training_fields)
    _check_same(saved, experiment.to_dict(), where, may_change)


def _check_same(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    where: Path,
    allowed: Mapping[str, set[str] | None],
) -> None:
    """`allowed`: section -> fields that may differ, None for all."""
    # Through JSON, so that tuples and lists compare equal.
    current = json.loads(json.dumps(current))
    try:
        # Read and written again: a field that did not exist yet has its default.
        saved = json.loads(json.dumps(make_experiment(saved).to_dict()))
    except ConfigError as error:
        raise CheckpointError(f"{where}: its config is of another version: {error}") from None
    for section in sorted(set(saved) | set(current)):
        may_change = allowed.get(section, set())
        if may_change is None:
            continue
        old, new = saved.get(section, {}), current.get(section, {})
        for field in sorted((set(old) | set(new)) - may_change):
            if old.get(field) != new.get(field):
                raise CheckpointError(
                    f"{where}: was started with {section}.{field}={old.get(field)!r}, the config has"
                    f" {new.get(field)!r}: use another --workdir, or the old value"
                )


def check_base(meta: Mapping[str, Any], base_fingerprint: str, where: Path) -> None:
    """Raises CheckpointError unless the checkpoint was trained on the base with this fingerprint."""
    if meta["base_fingerprint"] != base_fingerprint:
        raise CheckpointError(
            f"{where}: was trained on the base model {meta['base_fingerprint']}, the loaded one is {base_fingerprint}:"
            " the adapter fits only the very weights it was trained on"
        )

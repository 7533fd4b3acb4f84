"""Checkpoints under T5X: the base comes from its own checkpoint, each run's hold the adapter, its optimizer state and the step.

A run's checkpoints are T5X's, in its format, under its names; they lack the base's leaves where the base has a checkpoint of
its own. T5X is told of this class by gin, and not to use its Orbax manager, which knows no other class on resuming
(`train.use_orbax = False`). Base checkpoints are read in either of T5X's formats.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from sira_jax.adapters import is_adapter, partition
from sira_jax.checkpoints.fingerprint import fingerprint
from sira_jax.checkpoints.layout import listed
from sira_jax.errors import CheckpointError
from sira_jax.t5x_integration.engine import checkpoints, state_utils
from sira_jax.t5x_integration.native import is_native, restore_native

BASE_FILE = "base.json"
_LISTED = 3  # leaves named in one message
_gfile = checkpoints.gfile


def base_only(
    saved: Mapping[str, Any], current: Mapping[str, Any], is_resuming: bool = False
) -> Mapping[str, Any]:
    """For `RestoreCheckpointConfig.state_transformation_fns`: takes the frozen base from a checkpoint and nothing else.

    With `fallback_to_scratch`, T5X initialises the adapter, its optimizer state and the step. A run that resumes takes
    all of its own checkpoint.

    Args:
      saved: state in the checkpoint.
      current: state of the model.
      is_resuming: whether the checkpoint is the run's own.

    Raises:
      CheckpointError: the checkpoint lacks a leaf of the base, or has one more.
    """
    if is_resuming:
        return saved
    there = _base_leaves(saved)
    needed = _base_leaves(current)
    problems = [
        f"{what}: {listed(sorted('/'.join(path) for path in paths), _LISTED)}"
        for what, paths in (
            ("not in the checkpoint", needed.keys() - there.keys()),
            ("not in the model", there.keys() - needed.keys()),
        )
        if paths
    ]
    if problems:
        raise CheckpointError(
            f"the base checkpoint does not fit the model: {'; '.join(problems)}; do the model's sizes fit, with"
            " scan_layers=False as in T5X's minimal T5?"
        )
    return {"target": traverse_util.unflatten_dict(there)}


def _base_leaves(state: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    flat = state_utils.flatten_state_dict(state["target"])
    paths = {tuple(name.split("/")): leaf for name, leaf in flat.items()}
    return {path: leaf for path, leaf in paths.items() if not is_adapter(path)}


def adapter_only(state: Any, infos: Any) -> tuple[Any, Any]:
    """For `SaveCheckpointConfig.state_transformation_fns`: leaves the base out of what is written."""
    return tuple(
        {**tree, "target": partition(tree["target"], is_adapter)[0]} for tree in (state, infos)
    )


class AdapterCheckpointer(checkpoints.Checkpointer):
    """T5X's Checkpointer for models of `t5x_integration.models`.

    Args:
      train_state, partitioner, checkpoints_dir, dataset_iterator, keep, save_dtype, restore_dtype, keep_dataset_checkpoints:
        T5X's.
      base_path: checkpoint of the base, which what is written then does without; None writes the base too.

    Raises:
      CheckpointError: on restoring, if a checkpoint is missing or damaged, its shapes are not the model's, or it was written
        with another base.
    """

    def __init__(
        self,
        train_state: Any,
        partitioner: Any,
        checkpoints_dir: str,
        dataset_iterator: Any = None,
        *,
        keep: int | None = None,
        save_dtype: Any = jnp.float32,
        restore_dtype: Any = None,
        keep_dataset_checkpoints: int | None = None,
        base_path: str | None = None,
    ):
        super().__init__(
            train_state,
            partitioner,
            checkpoints_dir,
            dataset_iterator,
            keep=keep,
            save_dtype=save_dtype,
            restore_dtype=restore_dtype,
            keep_dataset_checkpoints=keep_dataset_checkpoints,
        )
        self._base_path = base_path
        self._base_fingerprint: str | None = None

    def save(
        self,
        train_state: Any,
        state_transformation_fns: Sequence[Any] = (),
        *,
        concurrent_gb: int = 128,
    ) -> None:
        """Writes a checkpoint, and beside it the base's fingerprint."""
        fns = list(state_transformation_fns)
        if self._base_path is not None:
            fns.append(adapter_only)
        super().save(train_state, fns, concurrent_gb=concurrent_gb)
        if self._base_fingerprint is None:
            self._base_fingerprint = base_fingerprint(train_state)
        where = self._get_checkpoint_dir(int(checkpoints.get_local_data(train_state.step)))
        if jax.process_index() == 0:
            content = {"fingerprint": self._base_fingerprint, "path": self._base_path}
            with _gfile.GFile(os.path.join(where, BASE_FILE), "w") as file:
                file.write(json.dumps(content) + "\n")

    def restore(
        self,
        step: int | None = None,
        path: str | None = None,
        state_transformation_fns: Sequence[Any] = (),
        fallback_state: Mapping[str, Any] | None = None,
        lazy_parameters: bool = False,
    ) -> Any:
        """The train state of a checkpoint of T5X or of native training, with the base from `base_path` if it is not there."""
        if path is None:
            step = self.latest_step() if step is None else step
            path = self._get_checkpoint_dir(step)
        if is_native(path):
            state = restore_native(path, self._with_base())
        else:
            if not _holds_base(path):
                base = {"target": self._read_base()}
                fallback_state = state_utils.merge_state(base, fallback_state or {})
            state = self._read(path, state_transformation_fns, fallback_state, lazy_parameters)
        self._check_base(path, state)
        return state

    def _read_base(self) -> dict[str, Any]:
        return partition(self._with_base().state_dict()["target"], is_adapter)[1]

    def _with_base(self) -> Any:
        """A train state with the base of `base_path` and zeros elsewhere."""
        if self._base_path is None:
            raise CheckpointError(
                "AdapterCheckpointer.base_path=None is not allowed: the checkpoint holds an adapter alone; give the base's,"
                " in gin by BASE_CHECKPOINT_PATH"
            )
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self._train_state.state_dict())
        return self._read(self._base_path, [base_only], zeros)

    def _read(
        self,
        path: str,
        fns: Sequence[Any],
        fallback: Mapping[str, Any] | None,
        lazy_parameters: bool = False,
    ) -> Any:
        try:
            if _is_orbax(path):
                # T5X's other format, which this class's parent cannot read.
                manager = checkpoints.OrbaxCheckpointManagerInterface(
                    os.path.dirname(path.rstrip("/")),
                    self._train_state,
                    self._partitioner,
                    restore_dtype=self.restore_dtype,
                )
                state = manager.restore(
                    path=path, state_transformation_fns=fns, fallback_state=fallback
                )
                manager.close()
            else:
                state = super().restore(
                    path=path,
                    state_transformation_fns=fns,
                    fallback_state=fallback,
                    lazy_parameters=lazy_parameters,
                )
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        except (ValueError, KeyError, OSError) as error:
            reason = str(error).strip().split("\n")[0][:300]
            raise CheckpointError(f"{path}: cannot be restored: {reason}") from error
        check_shapes(path, state, self._train_state)
        return state

    def _check_base(self, path: str, state: Any) -> None:
        file = os.path.join(path, BASE_FILE)
        if not _gfile.exists(file):
            return
        with _gfile.GFile(file) as handle:
            saved = json.loads(handle.read())
        own = base_fingerprint(state)
        if saved["fingerprint"] != own:
            raise CheckpointError(
                f"{path}: was trained on the base model {saved['fingerprint']} ({saved['path']}), the loaded one is {own}"
            )


def base_fingerprint(state: Any) -> str:
    """The name of the frozen base in a T5X train state (`checkpoints.fingerprint`)."""
    return fingerprint(partition(state.state_dict()["target"], is_adapter)[1])


def check_shapes(path: str, state: Any, expected: Any) -> None:
    """Raises CheckpointError, naming leaves, unless the restored parameters have the model's shapes: T5X does not look."""
    own = state_utils.flatten_state_dict(expected.state_dict()["target"])
    problems = [
        f"{name} is {tuple(leaf.shape)}, the model's is {tuple(own[name].shape)}"
        for name, leaf in state_utils.flatten_state_dict(state.state_dict()["target"]).items()
        if tuple(leaf.shape) != tuple(own[name].shape)
    ]
    if problems:
        raise CheckpointError(f"{path}: does not fit the model: {listed(problems, _LISTED)}")


def _is_orbax(path: str) -> bool:
    has_file = any(
        _gfile.exists(os.path.join(path, *parts))
        for parts in (("checkpoint",), ("state", "checkpoint"))
    )
    return _gfile.isdir(os.path.join(path, "state")) and not has_file


def _holds_base(path: str) -> bool:
    """Whether the checkpoint has parameters beside the adapter's."""
    if _is_orbax(path):
        return True
    try:
        tree = checkpoints.load_t5x_checkpoint(path, lazy_parameters=True)
    except (ValueError, OSError) as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise CheckpointError(f"{path}: cannot be restored: {reason}") from error
    return bool(_base_leaves(tree))

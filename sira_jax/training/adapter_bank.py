"""The adapters that are loaded on one base model, by name."""

from collections.abc import Mapping
from typing import Any

from flax import traverse_util

from sira_jax.adapters import AdapterConfig
from sira_jax.adapters.adapter_set import MEMBER_NAMES, AdapterSetConfig, is_member_name
from sira_jax.adapters.base import ADAPTER
from sira_jax.checkpoints.adapter_file import abstract_adapter, differences
from sira_jax.errors import CheckpointError, ConfigError
from sira_jax.models import Model, ModelConfig, make_model
from sira_jax.training.train_state import Params, merge_params

# What stands for the frozen model alone, wherever an adapter is named.
BASE = "base"


class AdapterBank:
    """Loads adapters that were trained alone, and gives the model whose batches may use any of them.

        bank = AdapterBank(config, frozen)
        bank.load("swahili", LoRAConfig(rank=4), adapter)
        model, params = bank.model(), bank.params()
        batch["adapter_ids"] = [bank.index("swahili"), bank.index("base")]
        logits = model.apply({"params": params}, batch)

    Loading or unloading makes another model, for which programs are compiled anew; picking among those that are loaded does
    not. The base is held once, and never changed.

    Args:
      config: sizes of the base.
      frozen: its parameters.
    """

    def __init__(self, config: ModelConfig, frozen: Params):
        self._config, self._frozen = config, frozen
        self._members: dict[str, tuple[AdapterConfig, Params]] = {}

    def names(self) -> tuple[str, ...]:
        """Of the loaded adapters, in the order of their ids."""
        return tuple(self._members)

    def index(self, name: str) -> int:
        """The id of an adapter in a batch's `adapter_ids`, -1 for "base". It holds until the next `unload`.

        Raises:
          ConfigError: no adapter of this name is loaded.
        """
        if name == BASE:
            return -1
        self._check_loaded(name)
        return self.names().index(name)

    def load(self, name: str, adapter: AdapterConfig, params: Mapping[str, Any]) -> None:
        """Adds an adapter under a name.

        Args:
          name: letters, digits and _; not "base".
          adapter: its config.
          params: its parameters and buffers, as a model with this adapter alone has them.

        Raises:
          ConfigError: the name is not allowed or taken, or the adapter's targets match no projection.
          CheckpointError: the parameters are not those of this adapter on this base.
        """
        self.check_new(name)
        expected, found = (
            {
                path: tuple(leaf.shape)
                for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()
            }
            for tree in (abstract_adapter(adapter, self._config), params)
        )
        if problems := differences(expected, found):
            raise CheckpointError(
                f"adapter {name!r} does not fit its config and the base: {problems}"
            )
        self._members[name] = (adapter, dict(params))

    def unload(self, name: str) -> None:
        """Forgets an adapter; those after it move up by one id.

        Raises:
          ConfigError: no adapter of this name is loaded.
        """
        self._check_loaded(name)
        del self._members[name]

    def check_new(self, name: str) -> None:
        """Raises ConfigError unless an adapter may be loaded under this name."""
        if name in self._members:
            raise ConfigError(f"adapter {name!r} is loaded already: unload it or take another name")
        check_name(name)

    def model(self, num_tasks: int = 0) -> Model:
        """The decoder with all loaded adapters; without any, the frozen model. `num_tasks`: see Decoder."""
        members = tuple((name, adapter) for name, (adapter, _) in self._members.items())
        adapter = AdapterSetConfig(members=members) if members else None
        return make_model(self._config, adapter, num_tasks)

    def adapters(self) -> Params:
        """The parameters of all loaded adapters, as the model of `model` has them."""
        flat = {}
        for name, (_, params) in self._members.items():
            for path, leaf in traverse_util.flatten_dict(params).items():
                at = path.index(ADAPTER) + 1
                flat[(*path[:at], name, *path[at:])] = leaf
        return traverse_util.unflatten_dict(flat)

    def params(self) -> Params:
        """All parameters of the model of `model`: the base's and the adapters'. Nothing is copied."""
        return merge_params(self.adapters(), self._frozen)

    def _check_loaded(self, name: str) -> None:
        if name not in self._members:
            known = ", ".join((BASE, *self._members))
            raise ConfigError(f"adapter {name!r} is not loaded; there are {known}")


def check_name(name: object) -> None:
    """Raises ConfigError unless an adapter may be called so."""
    if name == BASE or not is_member_name(name):
        raise ConfigError(
            f"adapter name {name!r} is not allowed: {MEMBER_NAMES}, and {BASE!r} is the frozen model's"
        )

"""The adapter methods by name. A new method is one file in this package and one line here."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sira_jax.adapters.adamix import AdaMixConfig
from sira_jax.adapters.base import AdapterConfig
from sira_jax.adapters.dora import DoRAConfig
from sira_jax.adapters.dynamic_dora import DynamicDoRAConfig
from sira_jax.adapters.lora import LoRAConfig
from sira_jax.adapters.malora import MALoRAConfig
from sira_jax.adapters.melora import MELoRAConfig
from sira_jax.adapters.milora import MiLoRAConfig
from sira_jax.adapters.molora import MoLoRAConfig
from sira_jax.adapters.mov import MoVConfig
from sira_jax.adapters.multilora import MultiLoRAConfig
from sira_jax.adapters.rac_lora import RACLoRAConfig
from sira_jax.adapters.reslora import ResLoRAConfig
from sira_jax.adapters.sira import SiRAConfig
from sira_jax.adapters.xgblora import XGBLoRAConfig
from sira_jax.errors import ConfigError, check

METHODS: dict[str, type[AdapterConfig]] = {
    config.method: config
    for config in (
        AdaMixConfig,
        DoRAConfig,
        DynamicDoRAConfig,
        LoRAConfig,
        MALoRAConfig,
        MELoRAConfig,
        MiLoRAConfig,
        MoLoRAConfig,
        MoVConfig,
        MultiLoRAConfig,
        RACLoRAConfig,
        ResLoRAConfig,
        SiRAConfig,
        XGBLoRAConfig,
    )
}


def make_config(fields: Mapping[str, Any]) -> AdapterConfig | None:
    """An adapter config from plain fields, `method` among them; None for method "none" (the frozen model).

    Raises:
      ConfigError: on an unknown method, an unknown field, or a value out of range, naming it.
    """
    check(isinstance(fields, Mapping), "adapter", fields, "a mapping of fields")
    fields = dict(fields)
    method = fields.pop("method", None)
    if method == "none":
        return None
    known_method = isinstance(method, str) and method in METHODS
    check(known_method, "adapter.method", method, f"one of none, {', '.join(sorted(METHODS))}")
    config_class = METHODS[method]
    known = {field.name for field in dataclasses.fields(config_class)}
    for name in fields:
        if name not in known:
            raise ConfigError(
                f"adapter.{name}={fields[name]!r} is not allowed: method {method!r} has the fields"
                f" {', '.join(sorted(known))}"
            )
    return config_class(**fields)

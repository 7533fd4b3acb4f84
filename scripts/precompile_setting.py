"""From the arguments of scripts/precompile.py to what is compiled; mistakes are found before anything is."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from scripts.arguments import parse_value
from scripts.precompile_programs import Setting
from sira_jax.adapters import METHODS, AdapterConfig, make_config
from sira_jax.errors import check
from sira_jax.models import DEPTHS, EncoderDecoderConfig
from sira_jax.models.presets import preset
from sira_jax.training import partitioning
from sira_jax.training.config import MeshConfig


def make_setting(args: argparse.Namespace, devices: Sequence[Any]) -> Setting:
    """What all compared programs share.

    Raises:
      ConfigError: an argument is not allowed, or the batch does not fit the devices; it names the argument.
    """
    config = preset(args.model, dtype=args.dtype, param_dtype=args.dtype, remat_policy=args.remat)
    depths = {name: getattr(config, name) for name in DEPTHS if hasattr(config, name)}
    if args.layers is not None:
        most = min(depths.values())
        check(args.layers <= most, "--layers", args.layers, f"at most the model's {most}")
        config = dataclasses.replace(config, **dict.fromkeys(depths, args.layers))
    has_encoder = isinstance(config, EncoderDecoderConfig)
    written = args.target_length if has_encoder else args.length
    cache_length = args.cache_length or written
    lengths = {"--length": args.length, "--cache_length": cache_length}
    if has_encoder:
        lengths["--target_length"] = args.target_length
    for name, length in lengths.items():
        limit = config.max_positions
        check(length <= limit, name, length, f"at most the model's {limit} positions")
    mesh_config = parse_mesh(args.mesh)
    mesh = partitioning.make_mesh(mesh_config, list(devices))
    rules = partitioning.make_rules(mesh_config)
    rows, steps = args.batch_size, args.accumulation_steps
    check(rows % steps == 0, "--accumulation_steps", steps, f"a divisor of --batch_size={rows}")
    partitioning.check_batch(mesh, rows, steps, rules)
    return Setting(
        config=config,
        mesh=mesh,
        rules=rules,
        batch_size=rows,
        length=args.length,
        target_length=written,
        accumulation_steps=steps,
        loss_chunk_size=args.loss_chunk_size,
        decode_batch=args.decode_batch or rows,
        cache_length=cache_length,
    )


def parse_mesh(text: str) -> MeshConfig:
    """MeshConfig of "fsdp=64,tensor=4": an axis that is not named has one device; without any, all devices are along fsdp.

    Raises:
      ConfigError: it is written otherwise, or names what is no axis.
    """
    axes = [field.name for field in dataclasses.fields(MeshConfig) if field.name != "rules"]
    if not text:
        return MeshConfig(data=1, fsdp=-1)
    sizes = dict.fromkeys(axes, 1)
    for part in text.split(","):
        name, equals, size = part.partition("=")
        known = name in axes and equals and size.removeprefix("-").isdecimal()
        check(bool(known), "--mesh", text, f"AXIS=N,... with axes of {', '.join(axes)}")
        sizes[name] = int(size)
    return MeshConfig(**sizes)


def parse_adapters(texts: Sequence[str], setting: Setting) -> dict[str, AdapterConfig]:
    """Adapters by how they are written, "lora:rank=4".

    Raises:
      ConfigError: unknown method or field, a value out of range, or it does not fit the model or the devices.
    """
    adapters = {}
    for text in texts:
        method, *changes = text.split(":")
        check(method in METHODS, "--adapters", method, f"methods {', '.join(METHODS)}")
        fields = {}
        for change in changes:
            field, equals, value = change.partition("=")
            check(equals == "=", "--adapters", text, "METHOD, or METHOD:FIELD=VALUE:...")
            fields[field] = parse_value(value)
        adapter = make_config(fields | {"method": method})
        adapter.check_model(setting.config.projections)
        adapters[text] = adapter
    return adapters

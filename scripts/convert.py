"""Converts models and adapters between formats.

  python scripts/convert.py hf models/qwen2 models/qwen2-bfloat16 --dtype=bfloat16
  python scripts/convert.py gguf smollm2-135m models/smollm2
  python scripts/convert.py adapter runs/sira adapters/sira --checkpoint=best
  python scripts/convert.py to-peft runs/lora exports/lora-peft
  python scripts/convert.py from-peft downloads/lora-peft adapters/lora --base=models/smollm2
  python scripts/convert.py merge runs/lora exports/merged

Each prints what went where; a tensor that has no place is an error. OUT appears whole or not at all. An existing folder is
replaced only with --force, and only if it holds nothing but files of such a conversion. The formats: docs/interchange.md.
"""

import contextlib
import dataclasses
import os
import sys
from argparse import Namespace

import jax
import jax.numpy as jnp
import numpy as np

from scripts.arguments import Parser
from scripts.cli import run_main
from scripts.conversion import (
    by_module,
    check_out,
    find_model,
    load_adapted,
    new_folder,
    print_mapping,
)
from sira_jax.adapters import merge
from sira_jax.checkpoints import (
    BaseModel,
    adapter_file,
    fingerprint,
    load_base_model,
    peft,
    save_hf_folder,
)
from sira_jax.checkpoints.gguf import GGUFSource
from sira_jax.checkpoints.layout import flatten, leaves
from sira_jax.checkpoints.safetensors import SafetensorsFolder
from sira_jax.errors import ConfigError
from sira_jax.models import make_model
from sira_jax.models.config import DTYPES
from sira_jax.training.merging import merge_error
from sira_jax.training.train_state import merge_params

_ERROR_TOKENS = (2, 64)  # rows and positions of the batch that a merged model is compared on


def convert_hf(args: Namespace) -> None:
    """A Hugging Face folder to one whose parameters are all of one type."""
    path = find_model(args.source, "SRC")
    if not os.path.isdir(path):
        raise ConfigError(f"SRC={path}: is no folder; for a GGUF file: scripts/convert.py gguf")
    model = load_base_model(path, param_dtype=args.dtype)
    with contextlib.closing(SafetensorsFolder(path)) as source:
        shapes = dict(source.shapes)
    targets = {name for leaf in leaves(model.config) for name in leaf.names}
    _save_model(args, model)
    # What the loader passes over: anything else that is not a parameter was an error.
    rest = "nothing: it follows from other tensors"
    print_mapping(
        (f"{name} {shape}", f"{name} {args.dtype}" if name in targets else rest)
        for name, shape in shapes.items()
    )


def convert_gguf(args: Namespace) -> None:
    """A GGUF file to a Hugging Face folder, dequantised."""
    path = find_model(args.source, "SRC")
    if os.path.isdir(path):
        raise ConfigError(f"SRC={path}: is a folder; for a Hugging Face one: scripts/convert.py hf")
    model = load_base_model(path, param_dtype=args.dtype)
    with contextlib.closing(GGUFSource(path)) as source:
        stored = dict(source.header.tensors)
        targets = {
            source.stored_name(name): name for leaf in leaves(model.config) for name in leaf.names
        }
    _save_model(args, model)
    rest = "rope_scaling of config.json"
    print_mapping(
        (
            f"{name} {tensor.shape} {tensor.kind.name}",
            f"{targets[name]} {args.dtype}" if name in targets else rest,
        )
        for name, tensor in stored.items()
    )


def _save_model(args: Namespace, model: BaseModel) -> None:
    with new_folder(args.out, args.force) as folder:
        save_hf_folder(
            folder,
            model.config,
            model.params,
            model.tokenizer_json,
            model.special,
            model.chat_template,
        )
    if model.tokenizer_json is None:
        print(f"no tokenizer is written: {model.tokenizer_error}")


def convert_adapter(args: Namespace) -> None:
    """A run's adapter to a folder of our format."""
    adapted = load_adapted(args.source, args.base, args.checkpoint)
    with new_folder(args.out, args.force) as folder:
        _save_adapter(folder, adapted.config, adapted.params, adapted.base)
    flat = flatten(adapted.params)
    print_mapping(
        (f"{'/'.join(path)} {flat[path].shape}", f"{name} {flat[path].shape[layer is not None :]}")
        for name, (path, layer) in adapter_file.tensor_places(adapted.params).items()
    )
    print(f"{adapted.config.method} of {adapted.origin} is in {args.out}")


def _save_adapter(folder, config, params, base: BaseModel) -> None:
    adapter_file.save_adapter(folder, config, params, base.config, fingerprint(base.params))


def convert_to_peft(args: Namespace) -> None:
    """An adapter to a PEFT folder."""
    adapted = load_adapted(args.source, args.base, args.checkpoint)
    with new_folder(args.out, args.force) as folder:
        peft.save_peft(
            folder,
            adapted.config,
            adapted.params,
            adapted.base.config,
            adapted.base.params,
            base_name=adapted.base_path,
        )
    _print_modules(adapter_file.tensor_shapes(adapted.params), _stored_shapes(args.out))
    print(f"{adapted.config.method} of {adapted.origin} is a PEFT adapter in {args.out}")


def convert_from_peft(args: Namespace) -> None:
    """A PEFT folder to one of our format."""
    base = load_base_model(find_model(args.base, "--base"), param_dtype=args.param_dtype)
    config, params = peft.load_peft(args.source, base.config, base.params)
    with new_folder(args.out, args.force) as folder:
        _save_adapter(folder, config, params, base)
    _print_modules(_stored_shapes(args.source), _stored_shapes(args.out))
    print(f"{config.method} of {args.source} is in {args.out}")


def _stored_shapes(folder: str) -> dict[str, tuple[int, ...]]:
    with contextlib.closing(adapter_file.open_weights(folder)) as source:
        return dict(source.shapes)


def _print_modules(
    sources: dict[str, tuple[int, ...]], targets: dict[str, tuple[int, ...]]
) -> None:
    """Prints which module's tensors became which one's; the two have their modules' last names in common."""

    def key(module: str) -> tuple[str, str]:
        layer, *_, last = module.split("layers.")[1].split(".")
        return layer, last.removesuffix("_proj")

    ends = {key(module): (module, held) for module, held in by_module(targets).items()}
    print_mapping(
        (f"{module}: {held}", ": ".join(ends[key(module)]))
        for module, held in by_module(sources).items()
    )


def convert_merge(args: Namespace) -> None:
    """The adapter and its base to one plain model."""
    adapted = load_adapted(args.source, args.base, args.checkpoint)
    dtype = args.dtype or adapted.base.config.param_dtype
    # In float32 up to the end: the sum is rounded once, to the type that is written.
    frozen = jax.tree.map(lambda x: x.astype(jnp.float32), adapted.base.params)
    params = merge_params(adapted.params, frozen)
    merged = jax.tree.map(lambda x: x.astype(dtype), merge(adapted.config, params))
    config = dataclasses.replace(adapted.base.config, param_dtype=dtype, dtype="float32")
    rows, length = _ERROR_TOKENS
    shape = (rows, min(length, config.max_positions))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape, dtype=np.int32)
    batch = {"decoder_input_tokens": tokens, "encoder_input_tokens": tokens}
    error = merge_error(make_model(config, adapted.config), params, merged, batch)
    _save_model(args, dataclasses.replace(adapted.base, config=config, params=merged))
    held = by_module(adapter_file.tensor_shapes(adapted.params))
    print_mapping(
        (f"{module}: kernel, {names}", f"{module}: kernel") for module, names in held.items()
    )
    print(f"{adapted.config.method} of {adapted.origin} is merged in {args.out}")
    print(
        f"logits of {tokens.size} random tokens, merged against adapted: largest difference"
        f" {error['max_abs_difference']:.3g}, relative {error['relative_difference']:.3g}"
    )


def _parser() -> Parser:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Command)

    def add(name: str, run, source: str) -> _Command:
        command = commands.add_parser(name, description=run.__doc__, help=run.__doc__)
        command.add_argument("source", metavar=source, help="what is converted")
        command.add_argument("out", metavar="OUT", help="folder to write")
        command.add_argument("--force", action="store_true", help="replace OUT")
        command.set_defaults(run=run)
        return command

    for name, run in (("hf", convert_hf), ("gguf", convert_gguf)):
        add(name, run, "SRC").add_argument(
            "--dtype", choices=DTYPES, default="float32", help="type of the parameters"
        )
    for name, run in (
        ("adapter", convert_adapter),
        ("to-peft", convert_to_peft),
        ("merge", convert_merge),
    ):
        command = add(name, run, "RUN_OR_FOLDER")
        command.add_argument("--base", help="the base model; default: the run's model.path")
        command.add_argument("--checkpoint", help="of a run: best (default), latest or a step")
        if run is convert_merge:
            command.add_argument(
                "--dtype", choices=DTYPES, help="type of the parameters; default: the base's"
            )
    command = add("from-peft", convert_from_peft, "FOLDER")
    command.add_argument("--base", required=True, help="the base model of the adapter")
    command.add_argument(
        "--param_dtype",
        choices=DTYPES,
        default="float32",
        help="type the base will be held in; an adapter is loaded on no other",
    )
    return parser


class _Command(Parser):
    """The parser of one command."""

    def __init__(self, *, prog: str, description: str):
        super().__init__(description)
        self.prog = prog


def main(args: Namespace) -> None:
    """Runs the command."""
    check_out(args.out, args.force)
    args.run(args)


if __name__ == "__main__":
    arguments = _parser().parse_args()
    run_main(lambda _: main(arguments), argv=sys.argv[:1])

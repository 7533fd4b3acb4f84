"""Compiles the train step and the decode step for TPUs that are not there, and prints what a chip would hold, compute and send.

  make precompile-setup
  python scripts/precompile.py --topology=v5e:16x16 --model=llama-3-8b --mesh=fsdp=64,tensor=4
  python scripts/precompile.py --topology=v5p:8x8x8 --model=llama-3-70b --mesh=fsdp=128,tensor=4 --programs=train

Each adapter is held against the frozen floor: the same model without one, forwards and back to the token embeddings (see
precompile_programs.py), and against the other adapters. Counts come from the optimized program, loops by their trips
(hlo_costs.py); times are estimates from below (roofline.py). No accelerator is needed: the compiler is in libtpu.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from scripts import precompile_report as report
from scripts.arguments import Parser, at_least_one
from scripts.chips import chip_of
from scripts.cli import run_main
from scripts.precompile_measure import Measured, measure, needed_flops
from scripts.precompile_programs import decode_program, train_program
from scripts.precompile_setting import make_setting, parse_adapters
from scripts.precompile_topology import describe
from sira_jax.files import write_text
from sira_jax.models.config import DTYPES, REMAT_POLICIES

PROGRAMS = {"train": train_program, "decode": decode_program}


def make_parser() -> Parser:
    """The arguments."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--topology", required=True, help="CHIP:SHAPE, such as v5e:16x16 or v5p:8x8x8")
    add("--model", required=True, help="a preset, such as llama-3-8b or t5-1.1-xxl")
    add("--layers", type=at_least_one, help="fewer layers than the preset has, in each stack")
    add(
        "--mesh",
        default="",
        metavar="AXIS=N,...",
        help="data, fsdp, tensor and expert; the default puts all devices along fsdp",
    )
    add(
        "--adapters",
        nargs="+",
        default=["sira:num_experts=16:rank=4:num_selected_experts=4", "lora:rank=4"],
        metavar="METHOD:FIELD=VALUE:...",
        help="what is compared with the frozen floor",
    )
    add(
        "--without_floor",
        action="store_true",
        help="only the adapters: how much memory and time, not how much over the floor",
    )
    add(
        "--programs",
        nargs="+",
        choices=tuple(PROGRAMS),
        default=list(PROGRAMS),
        help="train, decode",
    )
    add("--batch_size", type=at_least_one, default=256, help="rows of a step, over all chips")
    add("--length", type=at_least_one, default=2048, help="tokens a row; an encoder's rows")
    add("--target_length", type=at_least_one, default=512, help="tokens of a row behind an encoder")
    add("--accumulation_steps", type=at_least_one, default=1, help="microbatches of a train step")
    add("--loss_chunk_size", type=int, default=0, help="see docs/training.md")
    add("--remat", choices=REMAT_POLICIES, default="full", help="see DecoderConfig")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the base and the computation")
    add(
        "--decode_batch", type=at_least_one, help="rows of a decode step; the default is batch_size"
    )
    add("--cache_length", type=at_least_one, help="slots of its cache; the default is length")
    add("--top", type=int, default=0, help="also list so many instructions with the most traffic")
    add("--json", type=Path, help="also write the figures to this file")
    add("--hlo", type=Path, help="also write the optimized programs to this directory")
    return parser


def main(args: argparse.Namespace) -> None:
    """Compiles and prints."""
    chip = chip_of(args.topology)
    setting = make_setting(args, describe(args.topology))
    adapters = parse_adapters(args.adapters, setting)
    chips, needed = setting.mesh.size, needed_flops(setting)
    shape = " ".join(f"{name}={size}" for name, size in setting.mesh.shape.items())
    print(
        f"{args.model} on {args.topology}, {chips} chips, mesh {shape}; figures are for one chip",
        flush=True,
    )
    result: dict[str, Any] = {"arguments": _plain(vars(args)), "chips": chips, "programs": {}}
    for kind in args.programs:
        found: dict[str, Measured] = {}
        floor = {} if args.without_floor else {report.FLOOR: None}
        for name, adapter in (floor | adapters).items():
            measured = measure(name, PROGRAMS[kind](setting, adapter), setting.mesh, chip)
            found[name] = measured
            data = report.as_data(measured, chip, chips, needed if kind == "train" else None)
            if floor and name != report.FLOOR:
                data["over_floor"] = report.against(measured, found[report.FLOOR])
            result["programs"].setdefault(kind, {})[name] = data
            print(f"\n{kind}: {report.format_program(data)}", flush=True)
            if args.top:
                print(report.format_traffic(measured, args.top), flush=True)
            if args.hlo:
                args.hlo.mkdir(parents=True, exist_ok=True)
                write_text(args.hlo / f"{kind}-{name.replace(':', '-')}.txt", measured.text)
            if args.json:
                write_text(args.json, json.dumps(result, indent=1))
        print()
        for name in adapters if floor else ():
            ratios = result["programs"][kind][name]["over_floor"]
            print(f"{kind}: {report.format_ratios(name, ratios)}", flush=True)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}


if __name__ == "__main__":
    arguments = make_parser().parse_args()
    run_main(lambda _: main(arguments), argv=sys.argv[:1])

"""What scripts/precompile.py prints, and writes as JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

from scripts import hlo_collectives
from scripts.chips import Chip
from scripts.precompile_measure import Measured, beyond_floor

FLOOR = "floor"


def as_data(measured: Measured, chip: Chip, chips: int, needed: float | None) -> dict[str, Any]:
    """The figures of one program as plain data, all for one chip.

    Args:
      measured: the program.
      chip: what it was compiled for.
      chips: how many.
      needed: FLOPs over all chips that MFU is counted by; None for a program without such a figure.
    """
    memory, estimate = measured.memory, measured.estimate
    rows = hlo_collectives.by_kind(measured.collectives)
    mfu = None if needed is None else needed / (chips * chip.peak_flops * estimate.step)
    return {
        "name": measured.name,
        "bytes_held": dict(memory.inputs),
        "argument_bytes": memory.arguments,
        "scratch_bytes": memory.scratch,
        "peak_bytes": memory.peak,
        "memory_bytes": chip.memory_bytes,
        "flops": measured.cost.flops,
        "matrix_flops": measured.cost.matrix_flops,
        "hbm_bytes": measured.cost.bytes,
        "collectives": [
            {"kind": kind, "along": list(axes), **row} for (kind, axes), row in rows.items()
        ],
        "estimate": {
            "compute_s": estimate.compute,
            "memory_s": estimate.memory,
            "communication_s": estimate.communication,
            "step_s": estimate.step,
            "bound": estimate.bound,
        },
        "mfu": mfu,
        "check_once": _agreement(measured),
        "unknown_loops": measured.unknown_loops,
        "lower_s": measured.lower_seconds,
        "compile_s": measured.compile_seconds,
    }


def _agreement(measured: Measured) -> dict[str, float] | None:
    """Our counts with each loop's body once, over those of the compiler's analysis."""
    if measured.reported is None:
        return None
    flops, moved = measured.reported
    return {"flops": measured.once.flops / flops, "bytes": measured.once.bytes / moved}


def against(measured: Measured, floor: Measured) -> dict[str, Any]:
    """Ratios to the floor, and the collectives that the floor lacks."""
    extra: dict[str, list[dict]] = {}
    for one, purpose in beyond_floor(measured, floor):
        extra.setdefault(purpose, []).append(
            {
                "kind": one.kind,
                "along": list(one.axes),
                "bytes": one.payload,
                "runs": one.times,
                "scope": one.scope,
            }
        )
    return {
        "flops": measured.cost.flops / floor.cost.flops,
        "hbm_bytes": measured.cost.bytes / floor.cost.bytes,
        "step_s": measured.estimate.step / floor.estimate.step,
        "peak_bytes": measured.memory.peak / floor.memory.peak,
        "collectives_beyond": extra,
    }


def format_program(data: Mapping[str, Any]) -> str:
    """One program as lines of text."""
    held = ", ".join(f"{name} {_size(n)}" for name, n in data["bytes_held"].items() if n)
    share = data["peak_bytes"] / data["memory_bytes"]
    estimate = data["estimate"]
    lines = [
        f"{data['name']}  (traced in {data['lower_s']:.0f} s, compiled in {data['compile_s']:.0f} s)",
        f"  held            {held}",
        f"  scratch         {_size(data['scratch_bytes'])}",
        f"  peak            {_size(data['peak_bytes'])} of {_size(data['memory_bytes'])}, {share:.0%}"
        + ("" if share <= 1 else ": DOES NOT FIT"),
        f"  FLOPs           {_count(data['flops'])}, of matrices {_count(data['matrix_flops'])}",
        f"  HBM traffic     {_size(data['hbm_bytes'])}",
    ]
    for row in data["collectives"]:
        lines.append(
            f"  {row['kind']:<15} {row['runs']} runs, {_size(row['payload'])}, sent {_size(row['wire'])}, along"
            f" {' x '.join(row['along'])}"
        )
    mfu = "" if data["mfu"] is None else f", MFU {data['mfu']:.1%}"
    lines.append(
        f"  time at least   {_ms(estimate['step_s'])} ({estimate['bound']}-bound: compute {_ms(estimate['compute_s'])},"
        f" HBM {_ms(estimate['memory_s'])}, links {_ms(estimate['communication_s'])}){mfu}"
    )
    if data["check_once"]:
        check = data["check_once"]
        lines.append(
            f"  loops counted once, over the compiler's count: FLOPs {check['flops']:.3f}, bytes {check['bytes']:.3f}"
        )
    if data["unknown_loops"]:
        lines.append(f"  counted once, trips unknown: {', '.join(data['unknown_loops'])}")
    return "\n".join(lines)


def format_ratios(name: str, ratios: Mapping[str, Any]) -> str:
    """One program against the floor as lines of text."""
    lines = [
        f"{name} / {FLOOR}: FLOPs {ratios['flops']:.3f}, HBM traffic {ratios['hbm_bytes']:.3f},"
        f" time {ratios['step_s']:.3f}, peak {ratios['peak_bytes']:.3f}"
    ]
    for purpose, rows in ratios["collectives_beyond"].items():
        total = sum(row["bytes"] * row["runs"] for row in rows)
        lines.append(f"  collectives beyond the floor's, {purpose}: {len(rows)}, {_size(total)}")
        if purpose == "other":
            lines += [
                f"    {row['kind']} of {_size(row['bytes'])} x {row['runs']} along {' x '.join(row['along'])}: {row['scope']}"
                for row in _largest(rows)
            ]
    return "\n".join(lines)


def _largest(rows: Sequence[Mapping[str, Any]], most: int = 10) -> list[Mapping[str, Any]]:
    return sorted(rows, key=lambda row: -row["bytes"] * row["runs"])[:most]


def format_traffic(measured: Measured, most: int) -> str:
    """The instructions that move the most bytes of HBM."""
    lines = [f"{measured.name}: most HBM traffic"]
    for run in sorted(measured.runs, key=lambda run: -run.total.bytes)[:most]:
        lines.append(
            f"  {_size(run.total.bytes):>10} in {run.times} runs: {run.instruction.name} {run.instruction.scope}"
        )
    return "\n".join(lines)


def _size(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def _count(count: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"

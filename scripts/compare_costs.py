"""What a training step of each method of a comparison costs. `scripts/compare.py` calls it; costs.json is the result.

  python scripts/compare_costs.py runs/compare lora sira

FLOPs and bytes are those of XLA's cost analysis of the compiled step. The analysis counts the body of a loop once, however
often it runs, so it is made of a step without loops: layers apart, all logits at once, no microbatches. A model of many layers
is too large to compile so; the costs of two and three layers then give those of the others, which cost what the third does.

Times are of the step as it is trained, on a batch of the training data. The methods take turns, so that a ratio of two times of
the same round holds on a busy machine.
"""

import dataclasses
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from scripts import assemble
from scripts.arguments import Parser, at_least_one
from scripts.cli import run_main
from scripts.compare_runs import COSTS_FILE, RunSpec, first_experiments, load_plan
from scripts.timed_step import TimedStep, take_turns
from sira_jax.errors import check
from sira_jax.files import write_text
from sira_jax.models import DEPTHS, Model, ModelConfig, make_model
from sira_jax.training import partitioning
from sira_jax.training.config import ExperimentConfig
from sira_jax.training.optimizers import make_optimizer, make_schedule
from sira_jax.training.train_state import (
    abstract_params,
    fresh_state,
    init_adapter,
    split_params,
)
from sira_jax.training.train_step import make_train_step

# Up to so many layers are compiled apart; beyond, two smaller models are.
_MOST_LAYERS = 5
_FEW, _MORE = 2, 3
# A batch needs no more examples of a task, and tokenising all takes long.
_EXAMPLES_PER_TASK = 50

Costs = dict[str, float]


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("workdir", type=Path, help="the comparison's directory")
    parser.add_argument("methods", nargs="+", metavar="METHOD", help="which of its methods")
    parser.add_argument("--rounds", type=at_least_one, default=11, help="timed steps of a method")
    return parser


def main(args) -> None:
    """Measures and writes costs.json."""
    _, by_method = load_plan(args.workdir)
    for method in args.methods:
        check(method in by_method, "METHOD", method, f"some of {', '.join(by_method)}")
    specs = [by_method[method][0] for method in args.methods]
    result = {
        "experiments": first_experiments(specs),
        "rounds": args.rounds,
        "machine": {
            "device": str(jax.devices()[0]),
            "machine": platform.machine(),
            "cores": os.cpu_count(),
        },
        "methods": measure(specs, args.rounds, log=lambda line: print(line, flush=True)),
    }
    write_text(args.workdir / COSTS_FILE, json.dumps(result, indent=1))


def measure(
    specs: Sequence[RunSpec], rounds: int, log: Callable[[str], None] = lambda line: None
) -> dict[str, Costs]:
    """Costs of the methods, which share all but adapter and optimizer.

    Returns:
      method -> flops_per_token and bytes_per_token (of a whole step, over the positions of the batch), extrapolated (1 where
      the layers are too many to compile apart), scratch_bytes (what the compiled step needs besides its arguments and
      results), state_bytes (adapter and optimizer), seconds (of each round).
    """
    plan = assemble.Plan(specs[0].experiment)
    loaded, rates = plan.load_tasks("train", _EXAMPLES_PER_TASK)
    batch = plan.layout.put(plan.pipeline(loaded, rates).next_batch())
    frozen = split_params(plan.load_base().params)[1]
    names = [task.name for task in loaded]
    costs: dict[str, Costs] = {}
    steps: dict[str, TimedStep] = {}
    for spec in specs:
        costs[spec.method] = analyse(spec.experiment, plan.base.config, batch, names)
        log(f"{spec.method}: analysed")
        step = _timed_step(spec.experiment, plan, frozen, batch, names)
        costs[spec.method] |= {
            "scratch_bytes": step.scratch_bytes,
            "state_bytes": step.state_bytes,
        }
        steps[spec.method] = step
        log(f"{spec.method}: compiled")
    for method, seconds in take_turns(steps, rounds).items():
        costs[method]["seconds"] = seconds
    return costs


def analyse(
    experiment: ExperimentConfig,
    config: ModelConfig,
    batch: Mapping[str, Any],
    task_names: Sequence[str],
) -> Costs:
    """FLOPs and bytes a position of the batch, of the step without loops; see the module's text."""

    def of(depths: Mapping[str, int]) -> Costs:
        model = dataclasses.replace(config, **depths, scan_layers=False)
        return _analyse_unrolled(experiment, model, batch, task_names)

    depths = {field: getattr(config, field) for field in DEPTHS if hasattr(config, field)}
    if all(depth <= _MOST_LAYERS for depth in depths.values()):
        return of(depths) | {"extrapolated": 0}
    base = {field: min(depth, _FEW) for field, depth in depths.items()}
    costs = dict(few := of(base))
    for field, depth in depths.items():
        if depth > _FEW:
            more = of(base | {field: _MORE})
            for name in costs:
                costs[name] += (depth - _FEW) / (_MORE - _FEW) * (more[name] - few[name])
    return costs | {"extrapolated": 1}


def _make_step(
    experiment: ExperimentConfig, model: Model, task_names: Sequence[str], **changes: int
) -> tuple[Any, Callable]:
    train = dataclasses.replace(experiment.train, **changes)
    optimizer = make_optimizer(experiment.optimizer, train.num_steps)
    step = make_train_step(
        model,
        optimizer,
        make_schedule(experiment.optimizer, train.num_steps),
        seed=train.seed,
        num_steps=train.num_steps,
        accumulation_steps=train.accumulation_steps,
        loss_chunk_size=train.loss_chunk_size,
        task_names=task_names,
    )
    return optimizer, step


def _analyse_unrolled(
    experiment: ExperimentConfig,
    config: ModelConfig,
    batch: Mapping[str, Any],
    task_names: Sequence[str],
) -> Costs:
    model = make_model(config, experiment.adapter, len(task_names))
    optimizer, step = _make_step(
        experiment, model, task_names, accumulation_steps=1, loss_chunk_size=0
    )
    adapter, frozen = split_params(nn.unbox(abstract_params(model)))
    state = jax.eval_shape(lambda tree: fresh_state(tree, optimizer), adapter)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
    found = jax.jit(step, donate_argnums=0).lower(state, frozen, shapes).compile().cost_analysis()
    positions = batch["decoder_input_tokens"].size
    return {
        "flops_per_token": found["flops"] / positions,
        "bytes_per_token": found["bytes accessed"] / positions,
    }


def _timed_step(
    experiment: ExperimentConfig,
    plan: assemble.Plan,
    frozen: Any,
    batch: Mapping[str, jax.Array],
    task_names: Sequence[str],
) -> TimedStep:
    """The step as it is trained."""
    model = make_model(plan.base.config, experiment.adapter, len(task_names))
    optimizer, step = _make_step(experiment, model, task_names)
    everywhere = partitioning.replicated(plan.mesh)
    state = fresh_state(init_adapter(model, experiment.train.seed), optimizer)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(everywhere, everywhere))
    return TimedStep(jitted, jax.device_put(state, everywhere), frozen, batch)


if __name__ == "__main__":
    arguments = _parser().parse_args()
    run_main(lambda _: main(arguments), argv=sys.argv[:1])

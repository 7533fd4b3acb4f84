"""Runs with different adapters on one tiny base, and the scripts called on them in this process."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
from absl import flags

from scripts import assemble
from sira_jax.checkpoints import fingerprint
from sira_jax.checkpoints.adapter_file import save_adapter
from sira_jax.training import loop
from sira_jax.training.config import make_experiment
from sira_jax.training.train_state import init_adapter, split_params
from tests.hf_models import weights_by_rule, write_folder
from tests.integration.mistakes import SHAPE, fields
from tests.scripts.flagged import imported
from tests.tiny import draw

TASKS = ["cldr_number_en", "cldr_relative_sw"]
CONFIGS = {
    "lora": {"method": "lora", "rank": 2},
    "sira": {"method": "sira", "rank": 2, "num_experts": 4, "num_selected_experts": 2},
}
BOTH = "--adapters=l={0}/lora,s={0}/sira"


def make_runs(folder: Path) -> Path:
    """Makes in a folder the run directories lora, sira and frozen, and the adapter folder `folder`, a copy of lora."""
    shape = {**SHAPE, "num_hidden_layers": 2}
    write_folder(folder / "model", shape, weights_by_rule(shape))
    for seed, (name, adapter) in enumerate(CONFIGS.items()):
        experiment = make_experiment(
            fields(
                folder / "model",
                adapter=adapter,
                data__tasks=TASKS,
                decode={"max_new_tokens": 5},
                evaluate={"examples_per_task": 3},
            )
        )
        plan = assemble.Plan(experiment)
        frozen = split_params(plan.load_base().params)[1]
        meta = {"config": experiment.to_dict(), "base_fingerprint": fingerprint(frozen)}
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(meta))
        model = plan.model(0)
        drawn = draw(jax.eval_shape(lambda model=model: init_adapter(model, 0)), seed)
        checkpointer = loop.make_checkpointer(folder / name, experiment)
        checkpointer.save(2, drawn, {"step": np.int32(2)}, {"data": {}}, meta)
        checkpointer.close()
        if name == "lora":
            save_adapter(
                folder / "folder",
                experiment.adapter,
                drawn,
                plan.base.config,
                meta["base_fingerprint"],
            )
    plain = dataclasses.replace(experiment, adapter=None)
    (folder / "frozen").mkdir()
    meta = {"config": plain.to_dict(), "base_fingerprint": fingerprint(frozen)}
    (folder / "frozen/config.json").write_text(json.dumps(meta))
    return folder


def make_runner(runs: Path, monkeypatch, capsys):
    """A function that calls scripts/NAME.py in this process and returns what it printed.

    {0} in an argument is the folder of the runs, which is also its attribute `folder`; its attribute `errors` is what the last
    call wrote to standard error.
    """

    def call(name, *arguments, stdin=None):
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", stdin)
        with imported(name) as module:
            flags.FLAGS([name, *(argument.format(runs) for argument in arguments)])
            capsys.readouterr()
            module.main([])
            out, call.errors = capsys.readouterr()
            return out

    call.folder = runs
    return call

"""Says from a saved adapter what its routers do: entropy, load and drops, and whether experts specialise, on what.

  python scripts/analyze_router.py --workdir=runs/sira
  python scripts/analyze_router.py --workdir=runs/sira --checkpoint=latest --examples=32 --shuffles=9 --out=runs/sira/routers

Reads the run's own tasks and split. Specialisation is the mutual information between a token's expert and its task, its
language, its kind (number, punctuation, ...), and the token itself; chance is what the same tokens give with the labels dealt
out anew, a task's among whole examples, a kind's among tokens. The routers before training are measured too: random ones tell
tokens apart as well. Routers never see a task's name.
Writes analysis.md, analysis.html with the figures, and analysis.json; docs/experiments.md says more.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from absl import flags

from scripts import assemble, figures, router_figures, router_labels
from scripts.cli import run_main
from scripts.report_page import Block, Figure, Paragraph, Section, to_html, to_markdown
from scripts.report_tables import Cell, Table, router_table
from scripts.router_information import Told, grouped, told
from scripts.router_passes import RouterPasses, Statistics
from scripts.run_results import (
    Projection,
    Router,
    Run,
    group_languages,
    read_run,
)
from sira_jax.errors import ConfigError
from sira_jax.files import make_directory, write_atomically
from sira_jax.training.train_state import init_adapter, split_params

WORKDIR = flags.DEFINE_string("workdir", None, "The run directory.")
CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "best, latest or a step.")
OUT = flags.DEFINE_string("out", None, "Where the analysis goes; default: WORKDIR/routers.")
EXAMPLES = flags.DEFINE_integer(
    "examples", 32, "Most examples of each task; 0 for all.", lower_bound=0
)
SHUFFLES = flags.DEFINE_integer(
    "shuffles", 5, "Times that labels are dealt out anew.", lower_bound=1
)
TOKENS = flags.DEFINE_integer("tokens", 48, "Commonest tokens that are told apart.", lower_bound=2)

_TOP_ROUTERS, _TOP_TOKENS, _LEAST_COUNT = 3, 6, 5


def main(argv: list[str]) -> None:
    """Analyses, writes and prints the short text."""
    del argv
    if not WORKDIR.value:
        raise ConfigError("--workdir=DIR is needed, a run with an adapter that has routers")
    plan = assemble.Plan(assemble.read_experiment(None, WORKDIR.value))
    if plan.experiment.adapter is None:
        raise ConfigError(f"--workdir={WORKDIR.value}: the frozen model has no router")
    out = Path(OUT.value or Path(WORKDIR.value) / "routers")
    sections, pngs, content = analyze(plan, WORKDIR.value, CHECKPOINT.value)
    make_directory(out, f"--out={out}")
    title = f"Routers of {WORKDIR.value}"
    files = {
        **pngs,
        "analysis.json": json.dumps(content, indent=1).encode(),
        "analysis.md": to_markdown(title, sections).encode("utf-8", "replace"),
        "analysis.html": to_html(title, sections, pngs).encode("utf-8", "replace"),
    }
    for name, text in files.items():
        write_atomically(out / name, lambda file, text=text: file.write(text))
    print("\n".join(content["text"]))
    print(f"\nanalysis: {out / 'analysis.html'}")


def analyze(
    plan: assemble.Plan, workdir: str, checkpoint: str
) -> tuple[list[Section], dict[str, bytes], dict[str, Any]]:
    """The page's sections, its pictures, and everything as plain data.

    Raises:
      SiraError: the adapter cannot be read, or its method has no router.
    """
    split = plan.experiment.evaluate.split
    loaded, _ = plan.load_tasks(split, EXAMPLES.value)
    names = [task.name for task in loaded]
    batches = list(plan.eval_batches(loaded))
    frozen = split_params(plan.load_base().params)[1]
    common = router_labels.frequent_tokens(batches, TOKENS.value)
    # One number of labels for all passes, so that one compiled program serves them.
    count = max(len(names), len(common) + 1, len(router_labels.KINDS))
    model = plan.model(count)
    adapter, step = assemble.restore_adapter(
        plan.experiment, plan.mesh, model, frozen, workdir, checkpoint
    )
    texts = [plan.vocabulary.id_to_text(i) for i in range(plan.vocabulary.vocab_size)]
    label_of = np.full(max(plan.base.config.vocab_size, len(texts)), len(common), np.int32)
    label_of[common] = np.arange(len(common))
    kind_of = np.full(len(label_of), router_labels.KINDS.index("other"), np.int32)
    kind_of[: len(texts)] = router_labels.kinds_in(plan.vocabulary)
    labelled = {
        "task": batches,
        "kind of token": router_labels.label_tokens(batches, kind_of),
        "token": router_labels.label_tokens(batches, label_of),
    }
    shuffles = {
        (name, seed): deal(labelled[name], seed)
        for name, deal in (
            ("task", router_labels.shuffle_examples),
            ("kind of token", router_labels.shuffle_tokens),
            ("token", router_labels.shuffle_tokens),
        )
        for seed in range(SHUFFLES.value)
        if name != "task" or len(names) > 1
    }
    with RouterPasses(
        model, frozen, count, len(batches), 2 * len(labelled) + len(shuffles)
    ) as passes:
        real = passes.run(labelled, adapter)
        if not real["task"]:
            method = plan.experiment.adapter.method
            raise ConfigError(f"--workdir={workdir}: adapter.method={method!r} has no router")
        by_chance = passes.run(shuffles, adapter)
        # The routers as this run's seed drew them: what they have learned is what they tell besides.
        untrained = passes.run(labelled, init_adapter(model, plan.experiment.train.seed))
    tasks = real["task"]
    # A router of whole prompts counts prompts, which have no kind.
    per_token = _that_count_tokens(tasks, router_labels.token_counts(batches))

    def held(name: str, routers: Sequence[str], groups: Any = None) -> Told:
        chance = [_only(by_chance[name, seed], routers) for seed in range(SHUFFLES.value)]
        before = _only(untrained[name], routers)
        return told(_only(real[name], routers), chance, before, groups)

    found: dict[str, Told] = {}
    if len(names) > 1:
        found["task"] = held("task", list(tasks))
        languages = group_languages(names)
        groups = [[names.index(t) for t in members] for members in languages.values()]
        if len(groups) > 1:
            found["language"] = held("task", list(tasks), groups)
    if per_token:
        found |= {name: held(name, per_token) for name in ("kind of token", "token")}
    kinds, tokens = (_only(real[name], per_token) for name in ("kind of token", "token"))
    run = _as_run(workdir, split, names, tasks)
    pngs = _draw(run, found)
    tops = _top_routers(found["token"]) if per_token else []
    for projection, layer in tops[:1]:
        pngs["preferences.png"] = _draw_kinds(kinds, projection, layer)
    text = [f"Checkpoint of step {step}, {split} split, {len(names)} tasks."]
    text += _describe(run.router) + _during_training(run)
    text += [_sentence(name, value) for name, value in found.items()]
    favourites = [_favourites(tokens, p, layer, [texts[i] for i in common]) for p, layer in tops]
    sections = _sections(run, found, text, pngs, favourites)
    return sections, pngs, {"text": text, "step": step, **_plain(found, run)}


def _that_count_tokens(statistics: Statistics, counts: Sequence[int]) -> list[str]:
    return [n for n, s in statistics.items() if int(s["task_tokens"][0].sum()) in counts]


def _only(statistics: Statistics, names: Sequence[str]) -> Statistics:
    return {name: statistics[name] for name in names}


def _as_run(workdir: str, split: str, names: Sequence[str], statistics: Statistics) -> Run:
    """The run with these statistics, whose labels after the tasks' are empty, as its router report."""
    projections = tuple(
        Projection(
            name,
            {
                field: values[:, : len(names)] if field.startswith("task_") else values
                for field, values in own.items()
                if len(names) > 1 or not field.startswith("task_")
            },
        )
        for name, own in statistics.items()
    )
    run = read_run(Path(workdir).resolve().name or "run", Path(workdir), split)
    return Run(
        name=run.name,
        split=split,
        metrics=run.metrics,
        summary=run.summary,
        evaluation=run.evaluation,
        predictions=run.predictions,
        router=Router(tuple(names), projections),
    )


def _draw(run: Run, found: Mapping[str, Told]) -> dict[str, bytes]:
    with matplotlib.rc_context(figures.STYLE):
        drawn = {
            "expert_load.png": figures.expert_load(run),
            "gate_entropy.png": figures.gate_entropy(run),
        }
        if len(run.router.tasks) > 1:
            drawn["task_routing.png"] = figures.task_routing(run)
        pngs = {name: figures.to_png(figure) for name, figure in drawn.items() if figure}
    if found:
        pngs["information.png"] = router_figures.information_by_layer(found)
    curve = router_figures.training(run)
    return pngs | ({"training.png": curve} if curve else {})


def _top_routers(value: Told) -> list[tuple[str, int]]:
    """(projection, layer) of the routers that tell most."""
    pairs = [(x, name, layer) for name, x_L in value.real_L.items() for layer, x in enumerate(x_L)]
    return [(name, layer) for _, name, layer in sorted(pairs, reverse=True)[:_TOP_ROUTERS]]


def _draw_kinds(statistics: Statistics, projection: str, layer: int) -> bytes:
    load_ZE, weight_Z, all_E = _at(statistics, projection, layer)
    there = [z for z in range(len(router_labels.KINDS)) if weight_Z[z] > 0]
    rows = [router_labels.KINDS[z] for z in there]
    shares = weight_Z[there] / weight_Z.sum()
    lift_UE = load_ZE[there] / np.maximum(all_E, 1e-12)
    return router_figures.preferences(f"{projection}, layer {layer}", rows, lift_UE, list(shares))


def _at(statistics: Statistics, projection: str, layer: int) -> tuple[np.ndarray, ...]:
    load_LZE, weight_LZ = grouped(statistics[projection], None)
    weight_Z = weight_LZ[layer]
    all_E = weight_Z @ load_LZE[layer] / max(weight_Z.sum(), 1e-30)
    return load_LZE[layer], weight_Z, all_E


def _favourites(
    statistics: Statistics, projection: str, layer: int, texts: Sequence[str]
) -> tuple[str, Table]:
    """A row an expert: its load, and the tokens that meet it most above the average."""
    load_ZE, weight_Z, all_E = _at(statistics, projection, layer)
    lift_ZE = load_ZE / np.maximum(all_E, 1e-12)
    usable = [z for z in range(len(texts)) if weight_Z[z] >= _LEAST_COUNT]
    rows = []
    for expert in np.argsort(-all_E):
        best = sorted(usable, key=lambda z, e=expert: -lift_ZE[z, e])[:_TOP_TOKENS]
        shown = [
            f"{json.dumps(texts[z], ensure_ascii=False)} ×{lift_ZE[z, expert]:.1f}" for z in best
        ]
        cells = [str(expert), f"{100 * all_E[expert]:.1f}", ", ".join(shown)]
        rows.append([Cell(cell) for cell in cells])
    header = ["expert", "load, %", "tokens, times as often as on average"]
    return f"{projection}, layer {layer}", Table(header, rows)


def _describe(router: Router) -> list[str]:
    entropies = np.concatenate([p.statistics["gate_entropy"] for p in router.projections])
    highest = np.concatenate(
        [
            np.full(len(p.statistics["gate_entropy"]), np.log(p.statistics["expert_load"].shape[1]))
            for p in router.projections
        ]
    )
    drops = np.concatenate([p.statistics["dropped_share"] for p in router.projections])
    loads = [p.relative_load_LE for p in router.projections]
    idle = np.concatenate([(load < 0.1).ravel() for load in loads])
    return [
        f"{len(entropies)} routers: gate entropy {np.mean(entropies):.3f} nats on average, from"
        f" {entropies.min():.3f} to {entropies.max():.3f}, of at most {np.mean(highest):.3f}.",
        f"{100 * np.mean(drops):.2f}% of the pairs were dropped; the busiest expert has"
        f" {max(load.max() for load in loads):.1f} times an even load, and {100 * np.mean(idle):.1f}% of"
        " all experts have under a tenth of one.",
    ]


def _during_training(run: Run) -> list[str]:
    """What the text above cannot say: training has a capacity of its own, evaluation by default none."""
    steps, shares = run.curve("train/router/dropped_share")
    if not steps:
        return []
    highest = max(range(len(steps)), key=lambda i: shares[i])
    return [
        f"In training {100 * shares[-1]:.2f}% of the pairs were dropped up to step {steps[-1]}, the last that"
        f" was logged, and at most {100 * shares[highest]:.2f}%, up to step {steps[highest]}."
    ]


def _verdict(name: str, value: Told) -> str:
    if value.mean <= value.chance_N.max():
        return f"No specialisation on the {name}: the experts tell no more than by chance."
    if value.mean <= value.before:
        return f"No specialisation on the {name} was learned: untrained routers tell as much."
    return (
        f"The experts specialise on the {name}: they tell more than by chance and before training."
    )


def _sentence(name: str, value: Told) -> str:
    above, all_of_them = value.above
    return (
        f"{_verdict(name, value)} The expert tells {value.mean:.4f} nats of the {name}"
        f" ({100 * value.mean / max(value.bound, 1e-12):.1f}% of the {value.bound:.3f} there are,"
        f" {value.labels} labels); by chance {value.chance_N.mean():.4f}, before training {value.before:.4f}."
        f" {above} of {all_of_them} routers tell more than in each of {len(value.chance_N)} shufflings"
        f" (all together: p = {value.p:.2g}, the least possible is {1 / (1 + len(value.chance_N)):.2g}),"
        f" {value.risen} more than before training."
    )


def _sections(
    run: Run,
    found: Mapping[str, Told],
    text: Sequence[str],
    pngs: Mapping[str, bytes],
    favourites: Sequence[tuple[str, Table]],
) -> list[Section]:
    captions = {
        "information.png": "What a token's expert tells of its label. Dashed: before training. Bands: shufflings.",
        "training.png": "Means over all routers of the batches since the point before.",
        "gate_entropy.png": "Left: the lower, the surer the routers. Right: what capacity turned away.",
        "expert_load.png": "Orange: an expert gets more than an even load; violet: less.",
        "task_routing.png": "Gate entropy, load, and distance of the load from that of all tasks.",
        "preferences.png": "The router whose experts tell most of the token: by kind of token.",
    }
    blocks: list[Block] = [Paragraph("", text), router_table(run.router)]
    pictures = [Figure(name, caption) for name, caption in captions.items() if name in pngs]
    sections = [Section("In short", blocks), Section("Pictures", pictures)]
    if favourites:
        parts: list[Block] = []
        for name, table in favourites:
            parts += [Paragraph(f"{name}: tokens seen at least {_LEAST_COUNT} times."), table]
        sections.append(Section("What the most special experts prefer", parts))
    return sections


def _plain(found: Mapping[str, Told], run: Run) -> dict[str, Any]:
    return {
        "information": {
            name: {
                "labels": value.labels,
                "bound_nats": value.bound,
                "mean_nats": value.mean,
                "chance_nats": value.chance_N.tolist(),
                "p": value.p,
                "before_training_nats": value.before,
                "by_layer_before_training": {p: x_L.tolist() for p, x_L in value.fresh_L.items()},
                "by_layer": {p: x_L.tolist() for p, x_L in value.real_L.items()},
                "by_layer_shuffled": {p: x.tolist() for p, x in value.shuffled_NL.items()},
            }
            for name, value in found.items()
        },
        "routers": {
            p.name: {field: values.tolist() for field, values in p.statistics.items()}
            for p in run.router.projections
        },
        "tasks": list(run.router.tasks),
    }


if __name__ == "__main__":
    run_main(main)

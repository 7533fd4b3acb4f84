"""Writes a report that compares runs, from their directories alone.

  python scripts/report.py --workdirs=lora=runs/demo/lora,sira=runs/demo/sira --out=runs/demo/report

The output directory gets report.html, in which the figures are embedded, and report.md with the
figures beside it; overview.png is the short form. A file that a run lacks leaves cells blank, with
the reason below the table.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags

from scripts.cli import run_main
from scripts.report_page import (
    Block,
    Figure,
    Output,
    Paragraph,
    Samples,
    Section,
    markdown,
    markdown_table,
    to_html,
    to_markdown,
)
from scripts.report_tables import (
    NOT_TRAINED,
    group_quantities,
    main_quantities,
    router_table,
    table_of,
    verdict,
    warnings,
)
from scripts.run_results import (
    Run,
    all_tasks,
    group_languages,
    group_tasks,
    is_right,
    language_name,
    primary_metric,
    read_runs,
)
from sira_jax.errors import ConfigError, DataError
from sira_jax.files import write_atomically
from sira_jax.training.logging import METRICS_FILE

WORKDIRS = flags.DEFINE_list("workdirs", [], "The runs: NAME=DIRECTORY,NAME=DIRECTORY,...")
OUT = flags.DEFINE_string("out", None, "Directory of the report; made if missing.")
TITLE = flags.DEFINE_string("title", "Fine-tuning results", "Heading of the report.")
SPLIT = flags.DEFINE_string("split", "test", "Split that the runs were evaluated on.")

_SAMPLES_PER_TASK = 2


def main(argv: list[str]) -> None:
    """Writes the report and prints the main table."""
    del argv
    if not WORKDIRS.value or not OUT.value:
        raise ConfigError("--workdirs=NAME=DIRECTORY,... and --out=DIRECTORY are needed")
    runs: dict[str, Path] = {}
    for item in WORKDIRS.value:
        name, equals, directory = item.partition("=")
        if not equals or not directory or name in runs:
            raise ConfigError(
                f"--workdirs: {item!r} is not allowed: use NAME=DIRECTORY, each name once"
            )
        runs[name] = Path(directory)
    path = write_report(OUT.value, runs, title=TITLE.value, split=SPLIT.value)
    print(format_table(runs, split=SPLIT.value))
    print(f"\nreport: {path}")


def format_table(runs: Mapping[str, str | Path], *, split: str = "test") -> str:
    """The main table as Markdown that also reads well as plain text, with notes and the verdict.

    Raises ConfigError and DataError as `run_results.read_runs` does.
    """
    found = read_runs(runs, split)
    lines = [markdown_table(table_of(found, main_quantities(found)))]
    lines += [markdown(text) for text in (*warnings(found), *verdict(found))]
    return "\n\n".join(lines)


def write_report(
    out_dir: str | Path,
    runs: Mapping[str, str | Path],
    title: str = "Fine-tuning results",
    *,
    split: str = "test",
) -> Path:
    """Writes report.html, report.md and the figures; nothing is written before all is ready.

    Args:
      out_dir: made if missing; files of an earlier report are replaced.
      runs: name -> run directory, in the order of the columns.
      title: heading.
      split: split that the runs were evaluated on.

    Returns:
      Path of report.html.

    Raises:
      ConfigError: there is no run, or a name is not allowed.
      DataError: a directory is missing, a file in it is damaged, or `out_dir` cannot be written.
    """
    # Only the report needs matplotlib; the tables do not.
    from scripts import figures

    found = read_runs(runs, split)
    pngs = figures.draw_all(found)
    sections = _sections(found, set(pngs))
    files = {
        **pngs,
        # JSON can hold halves of surrogate pairs, which UTF-8 has not.
        "report.md": to_markdown(title, sections).encode("utf-8", "replace"),
        "report.html": to_html(title, sections, pngs).encode("utf-8", "replace"),
    }
    out_dir = Path(out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_atomically(out_dir / name, lambda file, content=content: file.write(content))
    except OSError as error:
        raise DataError(f"{out_dir}: the report cannot be written: {error}") from error
    return out_dir / "report.html"


def _sections(runs: Sequence[Run], files: set[str]) -> list[Section]:
    split = runs[0].split
    sections = [
        Section(
            "Results",
            [
                Paragraph(
                    f"Scores are of the {split} split; a group's score is the mean over its tasks."
                    " The best of a row is set in bold. Each column is a single run. Peak memory is"
                    " the training process's, the time of a step leaves out compilation."
                ),
                table_of(runs, main_quantities(runs)),
                Paragraph("", [*warnings(runs), *verdict(runs)]),
                Figure(
                    "overview.png",
                    "Left: share of right answers. Middle: loss on held-out examples during"
                    " training. Right: load of each expert in each layer.",
                ),
            ],
        )
    ]
    if "learning_curves.png" in files:
        caption = "Each point of the left panel is the mean of the steps since the point before."
        reasons = [
            f"{run.name} has no curve: {NOT_TRAINED if run.frozen else f'no {METRICS_FILE}'}."
            for run in runs
            if not run.metrics
        ]
        blocks = [Figure("learning_curves.png", caption), Paragraph("", reasons)]
        sections.append(Section("Learning curves", blocks))
    sections += [_router_section(run, files) for run in runs if run.router]
    tasks = all_tasks(runs)
    languages = {f"{language_name(c)} ({c})": t for c, t in group_languages(tasks).items()}
    for kind, groups in (("task group", group_tasks(tasks)), ("language", languages)):
        if groups:
            table = table_of(runs, group_quantities(runs, groups, only_primary=False))
            sections.append(Section(f"All measures by {kind}", [table]))
    samples = _samples(runs)
    if samples:
        intro = (
            f"The first {_SAMPLES_PER_TASK} examples of each task, not chosen. ✓: equal to the"
            " target. ✗: not equal. ≠: not equal either, but the task's own metric may accept other"
            " answers."
        )
        reasons = [
            f"{run.name} has none: no predictions_{split}.jsonl."
            for run in runs
            if run.predictions is None
        ]
        blocks = [Paragraph(intro, reasons), *samples]
        sections.append(Section("Outputs before and after", blocks))
    return sections


def _router_section(run: Run, files: set[str]) -> Section:
    blocks: list[Block] = [
        Paragraph(
            "Gate entropy is that of the router's probabilities, ln E when all E experts are"
            " equally likely. Dropped pairs are (token, expert) pairs that an expert had no room"
            " for. Load is an expert's share of the pairs that were processed, over an even share."
        ),
        router_table(run.router),
    ]
    for file, caption in (
        (
            f"expert_load_{run.name}.png",
            "Orange: an expert gets more than an even load; violet: less. An expert's number means"
            " nothing across projections, so the mean over them is paler than any one router.",
        ),
        (
            f"gate_entropy_{run.name}.png",
            "Left: the lower, the surer the routers. Right: what capacity turned away.",
        ),
        (
            f"task_routing_{run.name}.png",
            "Left and middle: gate entropy and load by task. Right: the share of a task's load that"
            " would have to move to other experts to give the load of all tasks together, taken in"
            " each layer and so not blurred by the mean; few tokens raise it by chance.",
        ),
    ):
        if file in files:
            blocks.append(Figure(file, caption))
    return Section(f"Experts of {run.name}", blocks)


def _samples(runs: Sequence[Run]) -> list[Samples]:
    keys: dict[str, list[tuple[str, str, str]]] = {}
    for run in runs:
        for key in run.predictions or {}:
            found = keys.setdefault(key[0], [])
            if key not in found and len(found) < _SAMPLES_PER_TASK:
                found.append(key)
    groups = []
    for group, tasks in group_tasks(list(keys)).items():
        examples = []
        for task in tasks:
            wrong = "✗" if primary_metric(runs, [task]) in ("exact_match", None) else "≠"
            for key in keys[task]:
                lines = [Output("input", key[1]), Output("target", key[2])]
                for run in runs:
                    text = (run.predictions or {}).get(key)
                    mark = "" if text is None else "✓" if is_right(text, key[2]) else wrong
                    lines.append(Output(run.name, text, mark))
                examples.append((task, lines))
        groups.append(Samples(group, examples))
    return groups


if __name__ == "__main__":
    run_main(main)

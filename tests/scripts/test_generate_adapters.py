"""generate.py and evaluate.py with several adapters on one tiny base, against the same scripts with each adapter alone."""

import dataclasses
import functools
import importlib
import io
import json
import shutil
import sys

import jax
import numpy as np
import pytest
from absl import flags

from scripts import assemble, cli
from sira_jax.adapters.base import PATHS
from sira_jax.checkpoints import fingerprint
from sira_jax.checkpoints.adapter_file import save_adapter
from sira_jax.errors import CheckpointError, ConfigError, DataError
from sira_jax.models import Decoder
from sira_jax.training import loop
from sira_jax.training.config import make_experiment
from sira_jax.training.train_state import init_adapter, merge_params, split_params
from tests.hf_models import weights_by_rule, write_folder
from tests.integration.mistakes import SHAPE, assert_mistake, contents, fields
from tests.integration.test_whole_run import script
from tests.tiny import draw

TASKS = ["cldr_number_en", "cldr_relative_sw"]
CONFIGS = {
    "lora": {"method": "lora", "rank": 2},
    "sira": {"method": "sira", "rank": 2, "num_experts": 4, "num_selected_experts": 2},
}
PROMPTS = ["Write 12.", "Say when\nthat was.", "A longer prompt than the others are."]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the run directories lora, sira and frozen, and the adapter folder `folder`, a copy of lora."""
    folder = tmp_path_factory.mktemp("runs")
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


@pytest.fixture
def run(runs, monkeypatch, capsys):
    """Runs scripts/NAME.py in this process and returns what it printed; {0} in an argument is the folder of the runs.

    `run.folder` is that folder, `run.errors` what the last call wrote to standard error.
    """

    def call(name, *arguments, stdin=None):
        before = set(flags.FLAGS)
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", stdin)
        module = importlib.import_module(f"scripts.{name}")
        try:
            flags.FLAGS([name, *(argument.format(runs) for argument in arguments)])
            capsys.readouterr()
            module.main([])
            out, call.errors = capsys.readouterr()
            return out
        finally:
            # Other scripts' flags have the same names.
            for flag in set(flags.FLAGS) - before:
                delattr(flags.FLAGS, flag)
            flags.FLAGS.unparse_flags()
            del sys.modules[f"scripts.{name}"]

    call.folder = runs
    return call


def terminal(*lines):
    text = io.StringIO("\n".join(lines) + "\n")
    text.isatty = lambda: True
    return text


@pytest.fixture(scope="module")
def answers(runs):
    """What each adapter alone answers to PROMPTS, by its name."""
    found = {}
    plan = assemble.Plan(assemble.read_experiment(None, str(runs / "lora")))
    frozen = split_params(plan.load_base().params)[1]
    tokens = plan.vocabulary.encode_batch([plan.template.render(p) for p in PROMPTS])
    found["base"] = plan.decode(Decoder(plan.base.config), frozen, tokens)
    for name in CONFIGS:
        plan = assemble.Plan(assemble.read_experiment(None, str(runs / name)))
        model = plan.model(0)
        adapter, _ = assemble.restore_adapter(plan, model, frozen, str(runs / name), "best")
        found[name] = plan.decode(model, merge_params(adapter, frozen), tokens)
    assert len({tuple(texts) for texts in found.values()}) == 3
    return found


BOTH = "--adapters=l={0}/lora,s={0}/sira"


def shown(*texts):
    """Answers as the scripts print them from a file."""
    return "".join(t.replace("\\", "\\\\").replace("\n", "\\n") + "\n" for t in texts)


def test_one_prompt(run, answers):
    prompt = f"--prompt={PROMPTS[0]}"
    assert run("generate", BOTH, prompt) == answers["lora"][0] + "\n"
    assert run("generate", BOTH, prompt, "--adapter=s") == answers["sira"][0] + "\n"
    assert run("generate", BOTH, prompt, "--adapter=base") == answers["base"][0] + "\n"


def test_a_file_of_requests(run, answers, tmp_path):
    requests = [
        {"prompt": PROMPTS[2], "adapter": "s"},
        {"prompt": PROMPTS[1]},
        {"adapter": None, "prompt": PROMPTS[2]},
        {"prompt": PROMPTS[1], "adapter": "base"},
        {"prompt": PROMPTS[0], "adapter": "f"},
    ]
    file = tmp_path / "prompts.jsonl"
    # A line separator of Unicode inside a text does not end a line of the file.
    lines = [json.dumps(request) for request in requests]
    lines.append(json.dumps({"prompt": "one\u2028two"}, ensure_ascii=False))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    out = run("generate", f"{BOTH},f={{0}}/folder", "--adapter=s", f"--file={file}")
    expected = shown(
        answers["sira"][2],
        answers["sira"][1],
        answers["base"][2],
        answers["base"][1],
        answers["lora"][0],
    )
    assert out.startswith(expected)
    assert out.count("\n") == 6


def test_a_text_file_and_a_file_without_adapters(run, answers, runs, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("".join(prompt.replace("\n", "\\n") + "\n" for prompt in PROMPTS))
    assert run("generate", BOTH, "--adapter=s", f"--file={file}") == shown(*answers["sira"])
    lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    arguments = ("--workdir={0}/sira", f"--file={tmp_path}/prompts.jsonl")
    assert run("generate", *arguments) == shown(*answers["sira"])


def test_a_conversation(run, answers):
    lines = [
        PROMPTS[0],
        "/adapters",
        "/use s",
        PROMPTS[0],
        "/use base",
        PROMPTS[0],
        "/load f={0}/folder",
        "/use f",
        PROMPTS[2],
        "/unload f",
        "/adapters",
        PROMPTS[2],
    ]
    runs_of = run.folder
    out = run("generate", BOTH, stdin=io.StringIO("\n".join(lines).format(runs_of) + "\n"))
    assert out == "".join(
        [
            answers["lora"][0] + "\n",
            f"* l lora {runs_of}/lora\n  s sira {runs_of}/sira\n  base\n",
            answers["sira"][0] + "\n",
            answers["base"][0] + "\n",
            answers["lora"][2] + "\n",
            f"  l lora {runs_of}/lora\n  s sira {runs_of}/sira\n* base\n",
            answers["base"][2] + "\n",
        ]
    )


def test_mistakes_on_a_terminal_are_told_and_it_goes_on(run, answers, capsys):
    bad = [
        "/use x",
        "/unload x",
        "/load s={0}/sira",
        "/load y",
        "/load y={0}",
        "/help",
        "/adapters s",
    ]
    lines = [line.format(run.folder) for line in bad]
    out = run("generate", BOTH, stdin=terminal(*lines, PROMPTS[0]))
    errors = run.errors.splitlines()
    named = [
        "'x' is not loaded",
        "'x' is not loaded",
        "'s' is loaded",
        "'y'",
        "'y'",
        "/help",
        "/ad",
    ]
    assert len(errors) == len(named)
    for line, part in zip(errors, named, strict=True):
        assert line.startswith("error: ")
        assert part in line
    assert answers["lora"][0] in out
    with pytest.raises(ConfigError, match="'x' is not loaded"):
        run("generate", BOTH, stdin=io.StringIO("/use x\n"))


# Mistakes in flags and files.

REQUESTS = [
    ('{"prompt": "a"', DataError, "line 1: is no JSON"),
    ('{"prompt": "a"}\n["a"]', DataError, "line 2: is not"),
    ('{"prompt": "a", "adaptor": "l"}', DataError, "line 1: is not"),
    ('{"prompt": " "}', DataError, "line 1: prompt=' '"),
    ('{"adapter": "l"}', DataError, "line 1: prompt=None"),
    ('{"prompt": "a", "adapter": 3}', DataError, "line 1: adapter=3"),
    ('{"prompt": "a", "adapter": "x"}', ConfigError, "line 1: adapter 'x'", "l, s, base"),
    ('{"prompt": "a"}\n\n{"prompt": "a"}', DataError, "line 2: is empty"),
    ("", DataError, "has no prompts"),
]


@pytest.mark.parametrize(("text", "error", "named"), [(t, e, named) for t, e, *named in REQUESTS])
def test_wrong_requests(text, error, named, run, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    assert_mistake(error, lambda: run("generate", BOTH, f"--file={file}"), file, *named)


def test_a_request_that_names_an_adapter_without_any(run, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "adapter": null}')
    arguments = ("--workdir={0}/sira", f"--file={file}")
    assert_mistake(ConfigError, lambda: run("generate", *arguments), "line 1", "needs --adapters")


FLAGS = [
    (["--adapters=lora"], "--adapters: 'lora'", "NAME=DIR"),
    (["--adapters="], "--adapters: ''", "NAME=DIR"),
    (["--adapters=l={0}/lora,"], "--adapters: ''"),
    (["--adapters=l={0}/lora,l={0}/sira"], "name 'l' is there twice"),
    (["--adapters=base={0}/lora"], "adapter name 'base'"),
    (["--adapters=1={0}/lora"], "adapter name '1'"),
    ([BOTH, "--adapter=x"], "--adapter: adapter 'x'", "l, s, base"),
    (["--adapter=x"], "--adapter needs --adapters"),
    ([BOTH, "--workdir={0}/lora"], "--workdir and --adapters"),
    ([BOTH, "--checkpoint=none"], "--checkpoint=none and --adapters", "--adapter=base"),
    ([BOTH, "--checkpoint=3"], "adapter 'l': --checkpoint='3'", "steps 2"),
    (["--adapters=l={0}/model"], "model/config.json"),
    (["--adapters=l={0}/none"], "none: is neither a run directory (config.json) nor"),
    (["--adapters=l={0}/lora,x={0}"], "adapter 'x': ", "is neither a run directory"),
    (["--adapters=l={0}/lora,x={0}/frozen"], "adapter 'x': ", "it has no adapter"),
    (["--adapters=f={0}/folder,l={0}/lora"], "--config=FILE is needed", "folder is an adapter"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "named"), [(a, named) for a, *named in FLAGS])
def test_wrong_flags(arguments, named, run):
    assert_mistake(ConfigError, lambda: run("generate", "--prompt=a", *arguments), *named)


def edited(runs, copy, change):
    """A copy of a run whose config and checkpoint say something else."""
    shutil.copytree(runs / "sira", copy)
    for file in (copy / "config.json", copy / "checkpoints/2/meta/metadata"):
        meta = json.loads(file.read_text())
        change(meta)
        file.write_text(json.dumps(meta))
    return copy


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        (
            lambda meta: meta.update(base_fingerprint="ab12"),
            CheckpointError,
            "was trained on the base model ab12",
        ),
        (
            lambda meta: meta["config"]["adapter"].update(method="lroa"),
            ConfigError,
            "adapter.method='lroa' is not allowed: one of none, ",
        ),
        (
            lambda meta: meta["config"]["adapter"].update(experts=4),
            ConfigError,
            "adapter.experts=4",
        ),
        (
            lambda meta: meta["config"]["model"].update(scan_layers=False),
            ConfigError,
            "model.scan_layers=False, here it is True",
        ),
    ],
)
def test_runs_that_do_not_belong_here(change, error, named, run, tmp_path):
    other = edited(run.folder, tmp_path / "other", change)
    adapters = f"--adapters=l={run.folder}/lora,x={other}"
    assert_mistake(error, lambda: run("generate", "--prompt=a", adapters), "adapter 'x': ", named)


def test_a_wrong_config_of_the_first_run(run, tmp_path):
    other = edited(run.folder, tmp_path / "other", lambda meta: meta["config"].pop("data"))
    call = functools.partial(run, "generate", "--prompt=a", f"--adapters=x={other}")
    assert_mistake(ConfigError, call, "adapter 'x': ", "data")


def test_a_mistake_is_one_line_and_status_2(runs):
    done = script("generate.py", f"--adapters=l={runs}/lora,l={runs}/sira")
    assert done.returncode == cli.USER_ERROR == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line == "error: --adapters: the name 'l' is there twice"


# Evaluation.


@pytest.fixture
def evaluated(run, tmp_path):
    """Evaluates with several adapters; returns (results, predictions, router report) from the files."""

    def call(*arguments):
        run("evaluate", f"--workdir={tmp_path}", *arguments)
        lines = (tmp_path / "predictions_test.jsonl").read_text().splitlines()
        router = tmp_path / "router_test.json"
        return (
            json.loads((tmp_path / "evaluation_test.json").read_text()),
            [json.loads(line) for line in lines],
            json.loads(router.read_text()) if router.exists() else None,
        )

    return call


def test_each_task_with_its_adapter(evaluated, run, runs, tmp_path):
    alone = {}
    for name in CONFIGS:
        copy = shutil.copytree(runs / name, tmp_path / f"copy_{name}")
        run("evaluate", f"--workdir={copy}")
        records = (copy / "predictions_test.jsonl").read_text().splitlines()
        results = json.loads((copy / "evaluation_test.json").read_text())
        alone[name] = (results, [json.loads(line) for line in records])
    assert [r["prediction"] for r in alone["lora"][1]] != [
        r["prediction"] for r in alone["sira"][1]
    ]

    results, predictions, router = evaluated(BOTH, "--assign=*_sw=s,cldr_*=l")
    assert results["assigned"] == {"cldr_number_en": "l", "cldr_relative_sw": "s"}
    assert results["examples"] == dict.fromkeys(TASKS, 3)
    assert results["checkpoint"] == "best"
    for name, own in (("l", "lora"), ("s", "sira")):
        source = results["adapters"][name]
        assert source["directory"] == f"{runs}/{own}"
        assert source["checkpoint"] == 2
        assert CONFIGS[own].items() <= source["adapter"].items()
    by_task = dict(zip(TASKS, CONFIGS, strict=True))
    assert predictions == [
        record for task in TASKS for record in alone[by_task[task]][1] if record["task"] == task
    ]
    for task, name in by_task.items():
        assert results["scores"][task] == alone[name][0]["scores"][task]
        for loss in (f"test/loss/{task}", f"test/accuracy/{task}"):
            np.testing.assert_allclose(
                results["losses"][loss], alone[name][0]["losses"][loss], rtol=1e-5
            )
    # The router of the one that has one saw the tokens of its own task alone.
    tokens = np.asarray(router["projections"]["s/attention/q"]["task_tokens"])
    assert set(router["projections"]) == {f"s/{path}" for path in PATHS}
    assert (tokens[:, 0] == 0).all()
    assert (tokens[:, 1] > 0).all()


def test_the_base_and_an_adapter_folder(evaluated, run, runs, tmp_path):
    config = tmp_path / "config.py"
    experiment = json.loads((runs / "lora/config.json").read_text())["config"]
    config.write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
        f"    return ConfigDict({experiment!r})\n"
    )
    results, predictions, router = evaluated(
        "--adapters=f={0}/folder", f"--config={config}", "--assign=cldr_number_en=f,*=base"
    )
    assert router is None
    assert results["adapters"]["f"]["checkpoint"] is None
    frozen = shutil.copytree(runs / "lora", tmp_path / "frozen")
    run("evaluate", f"--workdir={frozen}", "--checkpoint=none")
    expected = [json.loads(r) for r in (frozen / "predictions_test.jsonl").read_text().splitlines()]
    same = [a == b for a, b in zip(predictions, expected, strict=True)]
    assert same[3:] == [True] * 3
    assert not all(same[:3])


ASSIGNMENTS = [
    ([BOTH], "task cldr_number_en has no adapter"),
    ([BOTH, "--assign=*_sw=s"], "task cldr_number_en has no adapter", "*=NAME"),
    ([BOTH, "--assign=*=x"], "--assign: adapter 'x'", "l, s, base"),
    ([BOTH, "--assign=cldr_nubmer_en=l,*=s"], "'cldr_nubmer_en' fits none of the tasks cldr_number_en"),
    ([BOTH, "--assign=l"], "--assign: 'l' is not allowed: TASK=NAME"),
    (["--assign=*=l"], "--assign needs --adapters"),
    ([BOTH, "--assign=*=l", "--checkpoint=none"], "--checkpoint=none"),
    ([BOTH, "--assign=*=l", "--workdir={0}/lora"], "lora: is one run's"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "named"), [(a, named) for a, *named in ASSIGNMENTS])
def test_wrong_assignments(arguments, named, run):
    before = contents(run.folder)
    assert_mistake(ConfigError, lambda: run("evaluate", *arguments), *named)
    assert contents(run.folder) == before

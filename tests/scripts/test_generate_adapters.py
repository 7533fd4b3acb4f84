"""generate.py with several adapters on one tiny base, against each adapter alone."""

import functools
import io
import json
import shutil

import pytest

from scripts import assemble, cli
from sira_jax.checkpoints import checksums
from sira_jax.errors import CheckpointError, ConfigError, DataError
from sira_jax.models import Decoder
from sira_jax.training.train_state import merge_params, split_params
from tests.integration.mistakes import assert_mistake
from tests.integration.test_whole_run import script
from tests.scripts.adapter_runs import BOTH, CONFIGS, make_runner, make_runs

PROMPTS = ["Write 12.", "Say when\nthat was.", "A longer prompt than the others are."]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return make_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def run(runs, monkeypatch, capsys):
    return make_runner(runs, monkeypatch, capsys)


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
        adapter, _ = assemble.restore_adapter(
            plan.experiment, plan.mesh, model, frozen, str(runs / name), "best"
        )
        found[name] = plan.decode(model, merge_params(adapter, frozen), tokens)
    assert len({tuple(texts) for texts in found.values()}) == 3
    return found


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


def test_a_text_file_and_a_file_without_adapters(run, answers, tmp_path):
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


def test_mistakes_on_a_terminal_are_told_and_it_goes_on(run, answers):
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
    checksums.write(copy / "checkpoints/2")
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

"""What users get wrong in configs, data, prompts and flags: each mistake is a SiraError of one line that says what is wrong.

The mistakes in model files and run directories are in test_bad_files.py.
"""

import json

import pytest
from absl import flags
from ml_collections import config_flags

from scripts import cli
from sira_jax.errors import ConfigError, DataError, ModelFileError
from sira_jax.training.config import make_experiment
from tasks import bfcl
from tasks.loading import load_task
from tests.integration.mistakes import TASK, assert_mistake, contents, make_plan
from tests.integration.test_whole_run import CONFIG, script
from tests.scripts import flagged

pytestmark = pytest.mark.usefixtures("no_cache")

CONFIGS = [
    (
        {"trian": {"num_steps": 5}},
        "config='trian' is not allowed",
        "sections adapter, bad_loss, data",
    ),
    ({"train__stpes": 5}, "train.stpes=5", "num_steps"),
    ({"train__num_steps": "many"}, "train.num_steps='many'", "a whole number of at least 1"),
    ({"train__num_steps": 0}, "train.num_steps=0", "at least 1"),
    ({"optimizer__learning_rate": -1.0}, "optimizer.learning_rate=-1.0", "at least 0"),
    ({"optimizer__warmup_steps": 3}, "optimizer.warmup_steps=3", "train.num_steps=2"),
    ({"train__accumulation_steps": 3}, "train.accumulation_steps=3", "data.batch_size=4"),
    ({"train__keep_best": "validation/los"}, "train.keep_best='validation/los'", "validation/loss"),
    ({"mesh": {"data": 7, "tensor": 7}}, "mesh=", "'tensor': 7", "devices at hand"),
    ({"mesh": {"data": -1, "fsdp": -1}}, "mesh=", "at most one axis of -1"),
    ({"adapter": {"rank": 4}}, "adapter.method=None", "one of none, adamix, dora"),
    ({"adapter": {"method": "lroa"}}, "adapter.method='lroa'", "one of none, adamix, dora"),
    ({"adapter__experts": 8}, "adapter.experts=8", "num_experts"),
    ({"adapter__rank": 2.0}, "adapter.rank=2.0", "a whole number"),
    ({"adapter__num_selected_experts": 9}, "adapter.num_selected_experts=9", "num_experts=4"),
    ({"adapter__targets": ["query"]}, "adapter.targets", "query", "projection"),
    ({"adapter__targets": ["q", "vv"]}, "adapter.targets", "'vv'", "projection"),
    ({"adapter__targets": ["("]}, "adapter.targets='('", "regular expressions"),
    ({"adapter__overrides": {"down": {"rnk": 8}}}, "adapter.overrides['down']", "rnk", "rank"),
    ({"adapter__overrides": {"dwn": {"rank": 8}}}, "adapter.overrides", "'dwn'", "projection"),
    ({"data__template": "chat"}, "data.template='chat'", "vocabulary"),
    ({"data__sequence_length": 257}, "data.sequence_length=257", "256 positions"),
    ({"decode__max_new_tokens": 256}, "decode.max_new_tokens=256", "256 positions"),
    ({"data__tasks": [TASK, TASK]}, "data.tasks=", f"{TASK} is in it twice"),
    ({"model__path": "smollm-135m"}, "model.path='smollm-135m'", "smollm2-135m"),
    ({"model__path": "smollm2-135m"}, "model.path='smollm2-135m'", "download_data.py smollm2-135m"),
    ({"model__path": "bfcl"}, "model.path='bfcl'", "a model"),
]


@pytest.mark.parametrize(("changes", "named"), [(c, named) for c, *named in CONFIGS])
def test_config(changes, named, model, no_cache):
    assert_mistake(ConfigError, lambda: make_plan(model, **changes).load_tasks("train"), *named)
    assert contents(no_cache) == {}


def test_a_vocabulary_with_more_ids_than_the_model(model):
    few_ids = model.with_name("few_ids")
    assert_mistake(ConfigError, lambda: make_plan(few_ids), "data.vocabulary='bytes'", "96", "259")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data__tasks": ["cldr_nubmer_en"]}, ("'cldr_nubmer_en'", TASK)),
        ({"data__tasks": ["bfcl_simple"]}, ("BFCL_v4_simple_python.json", "download_data.py bfcl")),
        ({"data__vocabulary": "byte"}, ("vocabulary='byte'", "bytes, sentencepiece:/path")),
        ({"data__vocabulary": "sentencepiece:/none"}, ("/none", "No such file")),
        ({"data__vocabulary": "sentencepiece:{file}"}, ("{file}",)),
        ({"data__vocabulary": "tokenizers:{file}"}, ("{file}", "not a tokenizer")),
        ({"data__sequence_length": 8}, (f"task {TASK}, train example 0", "length=8", "too_long")),
        (
            {"data__sequence_length": 8, "data__too_long": "drop"},
            (f"task {TASK}: none of its", "length=8"),
        ),
    ],
)
def test_data(changes, named, model, tmp_path):
    file = tmp_path / "noise.model"
    file.write_bytes(b"\x80\x02no vocabulary")
    changes = {k: v.format(file=file) if isinstance(v, str) else v for k, v in changes.items()}

    def load():
        plan = make_plan(model, **changes)
        plan.pipeline(*plan.load_tasks("train"))

    assert_mistake(DataError, load, *(part.format(file=file) for part in named))


def test_a_model_without_the_tokenizer_that_is_asked_for(model):
    missing = model / "tokenizer.json"
    assert_mistake(ModelFileError, lambda: make_plan(model, data__vocabulary="model"), missing)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"id": "simple_1", "question": [[{"role": "us', "lines 2"),
        ('{"id": "simple_1", "question": []}', "lines 2"),
        ('{"id": "simple_1", "question": [[]], "function": [{}]}', "line 2: unexpected structure"),
        ('{"id": "simple_7", "question": [[]], "function": [{}]}', "line 2: no answer for id"),
    ],
)
def test_a_damaged_line_of_bfcl(line, named, tmp_path, monkeypatch):
    parameters = {"type": "dict", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    good = {
        "id": "simple_0",
        "question": [[{"role": "user", "content": "Double 4."}]],
        "function": [{"name": "double", "description": "", "parameters": parameters}],
    }
    answers = [{"id": f"simple_{i}", "ground_truth": [{"double": {"n": [4]}}]} for i in (0, 1)]
    for name in bfcl.FILES.values():
        (tmp_path / "bfcl/possible_answer").mkdir(parents=True, exist_ok=True)
        (tmp_path / "bfcl" / name).write_text(json.dumps(good) + "\n")
        text = "".join(json.dumps(answer) + "\n" for answer in answers)
        (tmp_path / "bfcl/possible_answer" / name).write_text(text)
    damaged = tmp_path / "bfcl" / bfcl.FILES["bfcl_multiple"]
    damaged.write_text(f"{json.dumps(good)}\n{line}\n")
    monkeypatch.setenv("SIRA_DATA_DIR", str(tmp_path))
    assert_mistake(DataError, lambda: load_task("bfcl_simple", "train", "bytes"), damaged, named)


@pytest.fixture
def generate():
    """scripts/generate.py; its flags, whose names other scripts use too, are taken back."""
    with flagged.imported("generate") as script:
        yield script


@pytest.mark.parametrize(
    ("prompts", "named"),
    [
        (b"", ("--file={file}", "has no prompts")),
        (b"one\n\nthree\n", ("--file={file}, line 2", "is empty")),
        (b"one\ncaf\xe9\n", ("--file={file}", "UTF-8", "byte 7")),
        (None, ("--file={file}", "No such file")),
    ],
)
def test_prompts(prompts, named, generate, tmp_path):
    file = tmp_path / "prompts.txt"
    if prompts is not None:
        file.write_bytes(prompts)
    flags.FLAGS(["generate.py", f"--file={file}"])
    named = [part.format(file=file) for part in named]
    assert_mistake(DataError, lambda: generate.main([]), *named)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--prompt=a", "--file=b"], "--prompt and --file"),
        (["--prompt="], "--prompt=''"),
        (["--prompt=a"], "--config=FILE or --workdir=DIR is needed"),
        (["--prompt=a", "--workdir=/none"], "--workdir=/none"),
    ],
)
def test_flags_of_generate(arguments, named, generate):
    flags.FLAGS(["generate.py", *arguments])
    assert_mistake(ConfigError, lambda: generate.main([]), named)


def config_files(folder, model):
    """A good config and, by name, files that are none."""
    good = CONFIG.format(model=str(model), steps=2)
    (folder / "good.py").write_text(good)
    (folder / "syntax.py").write_text("def get_config(:\n    pass\n")
    (folder / "no_function.py").write_text(good.replace("get_config():", "make_config():"))
    (folder / "raises.py").write_text(good.replace("sequence_length = 128", "pack = 'yes'"))
    return folder


COMMANDS = [
    ("good", ["--workdir={dir}/run", "--stpes=5"], "'stpes'"),
    ("good", ["--workdir={dir}/run", "--config.train.stpes=5"], "--config.train.stpes", "num_steps"),
    ("good", ["--workdir={dir}/run", "--config.train.num_steps=many"], "num_steps=many", "number"),
    ("good", [], "--workdir=DIR is needed"),
    ("none", ["--workdir={dir}/run"], "--config={dir}/none.py", "no such file"),
    ("syntax", ["--workdir={dir}/run"], "{dir}/syntax.py, line 1", "invalid syntax"),
    ("no_function", ["--workdir={dir}/run"], "{dir}/no_function.py", "function get_config"),
    ("raises", ["--workdir={dir}/run"], "{dir}/raises.py, line 14", "Could not override"),
]  # fmt: skip


# Each is a process of its own: the fast suite has the first two.
@pytest.mark.parametrize(
    ("config", "arguments", "named"),
    [
        pytest.param(c, a, n, marks=[pytest.mark.slow] if place > 1 else [])
        for place, (c, a, *n) in enumerate(COMMANDS)
    ],
)
def test_command_line(config, arguments, named, model, tmp_path, no_cache):
    folder = config_files(tmp_path, model)
    arguments = [argument.format(dir=folder) for argument in arguments]
    done = script("train.py", f"--config={folder / config}.py", *arguments)
    assert done.returncode == cli.USER_ERROR == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "Traceback" not in line
    assert len(line) < 400
    for part in named:
        assert part.format(dir=folder) in line
    assert not (folder / "run").exists()
    assert contents(no_cache) == {}


@pytest.mark.parametrize(
    ("flag", "values", "expected"),
    [
        ("data.tasks", ["a_task"], ("a_task",)),
        ("data.tasks", ["a_task,b_task"], ("a_task", "b_task")),
        ("data.tasks", ["a_task, b_task"], ("a_task", "b_task")),
        ("data.tasks", ["('a_task', 'b_task')"], ("a_task", "b_task")),
        ("data.tasks", ["['a_task', 'b_task']"], ("a_task", "b_task")),
        ("data.tasks", ["a_task", "b_task"], ("a_task", "b_task")),
        ("adapter.targets", ["q,mlp/(gate|up)"], ("q", "mlp/(gate|up)")),
        ("adapter.targets", ["mlp/.*"], ("mlp/.*",)),
        ("adapter.capacity_factor", ["None"], None),
        ("adapter.capacity_factor", ["2"], 2.0),
        ("adapter.eval_capacity_factor", ["1.5"], 1.5),
        ("adapter.group_size", ["64"], 64),
        ("adapter.group_size", ["None"], None),
        ("optimizer.clip_norm", ["None"], None),
        ("data.pack", ["false"], False),
    ],
)
def test_fields_as_users_type_them(flag, values, expected, model, tmp_path):
    own = flags.FlagValues()
    argv = ["train.py", f"--config={config_files(tmp_path, model)}/good.py"]
    argv += [f"--config.{flag}={value}" for value in values]
    config_flags.DEFINE_config_file("config", flag_values=own, sys_argv=argv)
    own(argv)
    section, field = flag.split(".")
    experiment = make_experiment(own.config.to_dict())
    assert getattr(getattr(experiment, section), field) == expected

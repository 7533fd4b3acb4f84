"""The function-calling tasks, on made-up files and, where they are there, on the real ones."""

import json

import pytest

from sira_jax.errors import DataError
from tasks import bfcl, specs
from tasks.function_calls import CallAnswers, parse_call
from tasks.loading import load_task
from tasks.metrics import METRICS


def function(name, **types):
    properties = {k: {"type": t, "description": f"The {k}."} for k, t in types.items()}
    return {
        "name": name,
        "description": f"Does\n {name}.",
        "parameters": {"type": "dict", "properties": properties, "required": list(types)[:1]},
    }


def row(index, name, request=None):
    return {
        "id": f"x_{index}",
        "question": [[{"role": "user", "content": request or f" Request {index}.\n"}]],
        "function": [function(name, city="string", days="integer"), function("other", a="any")],
    }


def answer(index, name):
    return {
        "id": f"x_{index}",
        "ground_truth": [{name: {"city": ["Nairobi"], "days": [index, ""]}}],
    }


def write(folder, file, rows, answers):
    (folder / "possible_answer").mkdir(parents=True, exist_ok=True)
    (folder / file).write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "possible_answer" / file).write_text("\n".join(map(json.dumps, answers)) + "\n")


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Three files of 40 lines; the functions are shared by ten lines of each."""
    monkeypatch.setenv("SIRA_DATA_DIR", str(tmp_path))
    for offset, file in enumerate(bfcl.FILES.values()):
        numbers = range(100 * offset, 100 * offset + 40)
        names = [f"f{number % 4 if offset else number}" for number in numbers]
        write(
            tmp_path / "bfcl",
            file,
            [row(n, name) for n, name in zip(numbers, names, strict=True)],
            [answer(n, name) for n, name in zip(numbers, names, strict=True)],
        )
    return tmp_path / "bfcl"


def all_examples(task):
    return {split: bfcl.load(task, split) for split in specs.SPLITS}


def joined(examples):
    return [example for rows in examples.values() for example in rows]


def test_an_example_by_hand(data):
    examples = joined(all_examples("bfcl_simple"))
    (example,) = (e for e in examples if "Request 7." in e["inputs"])
    assert example["inputs"] == (
        "Functions:\n"
        "f7(city: string, days?: integer): Does f7.\n"
        "- city: The city.\n"
        "- days: The days.\n"
        "other(a: any): Does other.\n"
        "- a: The a.\n"
        "Request: Request 7.\n"
        "Call:"
    )
    assert example["targets"] == "f7(city='Nairobi', days=7)"
    assert CallAnswers.from_json(example["answers"]).allowed == {
        "city": ["Nairobi"],
        "days": [7, ""],
    }
    assert METRICS["ast_match"](["f7(city='nairobi')"], [example]) == {"ast_match": 100.0}


def test_schema_details():
    schema = function("f", a="array", b="dict", c="string")
    schema["parameters"]["properties"]["a"]["items"] = {"type": "integer"}
    schema["parameters"]["properties"]["b"]["properties"] = {"k": {"type": "string"}}
    schema["parameters"]["properties"]["c"] |= {"enum": ["x", "y"], "default": "x"}
    text = bfcl.render_schema(schema)
    assert text.splitlines() == [
        "f(a: array[integer], b?: dict{k: string}, c?: string in ['x', 'y']): Does f.",
        "- a: The a.",
        "- b: The b.",
        "- c: The c. Default: 'x'.",
    ]
    assert bfcl.render_schema(schema, descriptions=False) == text.splitlines()[0].removesuffix(
        ": Does f."
    )


def test_splits_are_fixed_and_complete(data):
    examples = all_examples("bfcl_simple")
    assert sorted(map(len, examples.values()))[0] > 0
    assert sum(map(len, examples.values())) == 40
    bfcl._load.cache_clear()
    assert all_examples("bfcl_simple") == examples


def test_called_functions_and_requests_never_cross_splits(data):
    called = {split: set() for split in specs.SPLITS}
    inputs = {split: set() for split in specs.SPLITS}
    for task in bfcl.FILES:
        for split, examples in all_examples(task).items():
            called[split] |= {parse_call(example["targets"])[0] for example in examples}
            inputs[split] |= {example["inputs"] for example in examples}
    for sets in (called, inputs):
        assert len(set.union(*sets.values())) == sum(map(len, sets.values()))


def test_a_shared_request_joins_groups():
    def record(index, name, request):
        answers = CallAnswers(name, (), {}, {})
        return bfcl.Record(f"x_{index}", request, "", answers)

    records = [record(0, "a", "r"), record(1, "b", "r"), record(2, "b", "s"), record(3, "c", "t")]
    groups = bfcl._groups(records)
    assert groups["x_0"] == groups["x_1"] == groups["x_2"] != groups["x_3"]


def test_unanswerable_examples_are_left_out(tmp_path):
    rows, answers = [row(0, "f"), row(1, "f")], [answer(0, "f"), answer(1, "f")]
    answers[1]["ground_truth"][0]["f"]["city"] = []
    write(tmp_path, "a.json", rows, answers)
    assert [record.id for record in bfcl.read_file(tmp_path / "a.json")] == ["x_0"]


def test_tokenised_task_keeps_the_answers(data):
    task = load_task("bfcl_multiple", "train", "bytes", limit=3)
    assert len(task) == 3
    assert all("answers" in example for example in task.examples)
    assert task.metrics == ("exact_match", "ast_match")


def test_missing_files_say_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setenv("SIRA_DATA_DIR", str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"is missing: run `python scripts/download_data.py bfcl`"):
        bfcl.load("bfcl_simple", "train")
    monkeypatch.delenv("SIRA_DATA_DIR")
    monkeypatch.setenv("SIRA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"cache/bfcl/BFCL_v4_simple_python.json is missing"):
        bfcl.load("bfcl_simple", "train")


def test_an_argument_beats_the_environment(data, monkeypatch):
    monkeypatch.setenv("SIRA_DATA_DIR", "/nowhere")
    assert bfcl.load("bfcl_simple", "train", data_dir=data)


def test_a_changed_file_is_read_again(data):
    path = data / bfcl.FILES["bfcl_simple"]
    assert sum(map(len, all_examples("bfcl_simple").values())) == 40
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:30]))
    assert sum(map(len, all_examples("bfcl_simple").values())) == 30


def test_damaged_lines_are_named(data):
    path = data / bfcl.FILES["bfcl_simple"]
    lines = path.read_text().splitlines()
    lines[2] = lines[2][:40]
    lines[5] = '{"id": "x_5"}'
    lines[9] = "[]"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"BFCL_v4_simple_python.json: 3 damaged.*lines 3, 6, 10;"):
        bfcl.load("bfcl_simple", "train")


def test_bytes_that_are_no_text_are_damaged(data):
    path = data / bfcl.FILES["bfcl_simple"]
    path.write_bytes(b"\xff\xfe{}\n" + path.read_bytes())
    with pytest.raises(DataError, match=r"1 damaged lines .*lines 1;"):
        bfcl.load("bfcl_simple", "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(id="y"), "line 2: no answer for id 'y'"),
        (lambda r: r.update(question=[]), "line 2: unexpected structure"),
        (lambda r: r.update(function=[]), "line 2: unexpected structure"),
        (lambda r: r["function"][0].pop("parameters"), "line 2: function schema without"),
        (lambda r: r["function"][1].pop("parameters"), "line 2: unexpected structure"),
        (
            lambda r: r["function"][0]["parameters"]["properties"]["city"].update(type="str"),
            "line 2: parameter 'city': type 'str'",
        ),
    ],
)
def test_wrong_structure_names_the_line(tmp_path, change, message):
    rows = [row(0, "f"), row(1, "f")]
    change(rows[1])
    write(tmp_path, "a.json", rows, [answer(0, "f"), answer(1, "f")])
    with pytest.raises(DataError, match=message):
        bfcl.read_file(tmp_path / "a.json")


def test_empty_file(tmp_path):
    write(tmp_path, "a.json", [], [answer(0, "f")])
    with pytest.raises(DataError, match=r"a.json is empty"):
        bfcl.read_file(tmp_path / "a.json")


@pytest.fixture
def real():
    try:
        return bfcl.find_data_dir()
    except DataError:
        pytest.skip("the BFCL files were not downloaded (scripts/download_data.py bfcl)")


@pytest.mark.parametrize("task", list(bfcl.FILES))
def test_real_files(real, task):
    examples = all_examples(task)
    assert {split: len(rows) for split, rows in examples.items()} == dict(bfcl.SIZES[task])
    rows = joined(examples)
    targets = [row["targets"] for row in rows]
    assert METRICS["ast_match"](targets, rows) == {"ast_match": 100.0}
    # The answers tell examples apart: the next example's call is seldom right (requests repeat).
    shifted = METRICS["ast_match"](targets[1:] + targets[:1], rows)
    assert shifted["ast_match"] < 5


def test_real_files_do_not_leak(real):
    called = {split: set() for split in specs.SPLITS}
    for task in bfcl.FILES:
        for split, examples in all_examples(task).items():
            called[split] |= {parse_call(example["targets"])[0] for example in examples}
    assert called["train"].isdisjoint(called["test"] | called["validation"])
    assert called["validation"].isdisjoint(called["test"])

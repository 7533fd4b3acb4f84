"""The downloaded tasks on samples of the true files, where they are ($SIRA_TEST_DATA, else ../shared/data)."""

import json
import os
from pathlib import Path

import pytest

from tasks import masakhaner, reading, specs
from tasks.metrics import evaluate

SAMPLES = Path(os.environ.get("SIRA_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data")
# The sample's file -> upstream's name, where the sample is a part and has a name of its own.
PARTS = {"gsm8k/train.first5000.jsonl": "gsm8k/train.jsonl"}


def sample(folder):
    return pytest.param(
        folder,
        marks=pytest.mark.skipif(
            not (SAMPLES / folder).is_dir(),
            reason=f"{SAMPLES / folder} is not there (SIRA_TEST_DATA)",
        ),
    )


@pytest.fixture
def data(tmp_path, monkeypatch, request):
    """A data folder that holds links to the sample's files."""
    folder = request.param
    for path in (SAMPLES / folder).rglob("*.*"):
        name = str(path.relative_to(SAMPLES))
        link = tmp_path / PARTS.get(name, name)
        link.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            link.symlink_to(path)
    if folder == "finqa":
        for part, name in (("dev", "dev"), ("test", "test")):
            lines = (SAMPLES / folder / f"finqa_{part}_partial.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in lines]
            (tmp_path / folder / f"{name}.json").write_text(json.dumps(rows))
    monkeypatch.setenv("SIRA_DATA_DIR", str(tmp_path))
    return tmp_path


def sizes(task, *splits):
    spec = specs.get_task(task)
    for split in splits:
        declared = spec.sizes[split]
        assert declared is None or declared == len(spec.examples(split))
    return tuple(len(spec.examples(split)) for split in splits)


def scores_of_the_targets(task, split):
    spec = specs.get_task(task)
    examples = spec.examples(split)
    return evaluate(spec.metrics, [e["targets"] for e in examples], examples)


@pytest.mark.parametrize("data", [sample("snips")], indirect=True)
def test_snips(data):
    train, validation, test = sizes("snips", *specs.SPLITS)
    assert (train + validation, test) == (13784, 700)
    assert scores_of_the_targets("snips", "test") == {"exact_match": 100.0}


@pytest.mark.parametrize("data", [sample("gsm8k")], indirect=True)
def test_gsm8k(data):
    train, validation, test = sizes("gsm8k", *specs.SPLITS)
    assert (train + validation, test) == (5000, 1319)
    assert scores_of_the_targets("gsm8k", "test") == {"number_match": 100.0}


@pytest.mark.parametrize("data", [sample("banking77")], indirect=True)
def test_banking77(data):
    train, validation, test = sizes("banking77", *specs.SPLITS)
    assert (train + validation, test) == (10003, 3080)
    labels = {e["targets"] for e in specs.get_task("banking77").examples("train")}
    assert labels == set(json.loads((data / "banking77/categories.json").read_text()))


@pytest.mark.parametrize("data", [sample("ner_masakhaner_x")], indirect=True)
@pytest.mark.parametrize(
    ("language", "expected"), [("sw", (1441, 1000, 1000)), ("ha", (1441, 272, 545))]
)
def test_masakhaner(data, language, expected):
    """The targets made from the spans are those that the files hold."""
    assert sizes(f"xtreme_up_ner_{language}", *specs.SPLITS) == expected
    for split in specs.SPLITS:
        path = data / masakhaner.FOLDER / split / f"{language}.jsonl"
        stored = [json.loads(line)["target"] for line in path.open()]
        assert [e["targets"] for e in masakhaner.load(language, split)] == stored


@pytest.mark.parametrize("data", [sample("ner_bengali")], indirect=True)
def test_bengali_ner(data):
    with pytest.warns(reading.DamagedRowsWarning):
        examples = specs.get_task("bengali_ner").examples("train")
    assert len(examples) > 3000
    labels = {span.split(":")[0] for e in examples for span in e["targets"].split(" $$ ") if span}
    assert labels == {"PER", "LOC", "ORG", "TIM"}


@pytest.mark.parametrize("data", [sample("finqa")], indirect=True)
def test_finqa(data):
    """Upstream's programs compute upstream's answers."""
    assert sizes("finqa", "validation", "test") == (352, 446)
    for split in ("validation", "test"):
        scores = scores_of_the_targets("finqa", split)
        assert scores["program_accuracy"] == 100
        assert scores["execution_accuracy"] == 100


@pytest.mark.parametrize("data", [sample("afriqa_goldp")], indirect=True)
def test_afriqa(data):
    assert sizes("afriqa_ha", "validation", "test") == (222, 300)
    assert sizes("afriqa_ha", "train") == (223,)
    assert sizes("afriqa_sw", "test") == (295,)
    assert sizes("afriqa_rw", "train") == (214,)
    # A target of which SQuAD's normal form leaves nothing has F1 0 against itself.
    assert scores_of_the_targets("afriqa_ha", "test")["em"] == 100


@pytest.mark.parametrize("data", [sample("mtop_xsemplr")], indirect=True)
def test_mtop(data):
    for language in ("en", "th"):
        assert sizes(f"mtop_{language}", "validation", "test") == (859, 1237)


@pytest.mark.parametrize("data", [sample("dialogsum")], indirect=True)
def test_dialogsum(data):
    assert sizes("dialogsum", "validation", "test") == (500, 500)
    first = specs.get_task("dialogsum").examples("test")[0]
    assert len(json.loads(first["references"])) == 3

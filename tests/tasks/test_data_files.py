"""A run notices that a data file is another than the one it began with."""

import errno
import json
import os

import pytest

from sira_jax.errors import CheckpointError, DataError
from tasks import DecoderFeatures, InputPipeline, data_files, load_mixture, reading
from tasks.pipeline import ChangedDataWarning

FILE = "gsm8k/train.jsonl"


def write(root, count, start=0, extra=""):
    path = root / FILE
    path.parent.mkdir(exist_ok=True)
    rows = [
        {"question": f"What is {n} and 1?", "answer": f"{n + 1}\n#### {n + 1}"}
        for n in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + extra)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("SIRA_DATA_DIR", str(tmp_path))
    write(tmp_path, 60)
    return tmp_path


def pipeline(*tasks, allow=False):
    with data_files.recorded() as files:
        loaded = [load_mixture(task, "train", "bytes")[0][0] for task in tasks or ("gsm8k",)]
    return InputPipeline(
        loaded,
        [1.0] * len(loaded),
        batch_size=2,
        converter=DecoderFeatures(length=128, pad_id=0, bos_id=None),
        seed=0,
        files=data_files.fingerprints(files),
        allow_changed_data=allow,
    )


def state_after(source, batches=3):
    for _ in range(batches):
        source.next_batch()
    # As a checkpoint keeps it.
    return json.loads(json.dumps(source.state()))


def test_the_files_of_a_run_are_known_wherever_they_lie(root, tmp_path_factory, monkeypatch):
    state = state_after(pipeline())
    assert list(state["signature"]["files"]) == [FILE]
    other = tmp_path_factory.mktemp("elsewhere")
    write(other, 60)
    monkeypatch.setenv("SIRA_DATA_DIR", str(other))
    pipeline().restore(state)


def test_only_files_that_are_asked_for_meanwhile_are_recorded(root):
    with data_files.recorded() as outer:
        reading.data_file("gsm8k", "train.jsonl")
        with data_files.recorded() as inner:
            pass
    reading.data_file("gsm8k", "train.jsonl")
    assert (list(outer), inner) == ([FILE], {})


@pytest.mark.parametrize(
    "change",
    [
        {"count": 61},
        {"count": 60, "start": 1},
        {"count": 60, "extra": "\n"},
    ],
)
def test_a_changed_file_is_refused_by_its_name_unless_told_otherwise(root, change):
    state = state_after(pipeline())
    write(root, **change)
    with pytest.raises(CheckpointError) as error:
        pipeline().restore(state)
    assert str(error.value) == (
        f"data file {FILE} has changed since the checkpoint was made: bring the old data back, use another --workdir, or go on"
        " with the new data with --allow_changed_data"
    )
    allowed = pipeline(allow=True)
    with pytest.warns(ChangedDataWarning, match=f"data file {FILE} has changed .* new data"):
        allowed.restore(state)
    assert allowed.num_batches == 3
    # From the next checkpoint on it is this file that must be there.
    again = pipeline()
    again.restore(state_after(allowed, 0))
    for _ in range(40):
        assert again.next_batch().keys() == allowed.next_batch().keys()


def test_data_without_a_file_are_named_by_the_task(root):
    source = pipeline("gsm8k", "cldr_number_en")
    state = state_after(source)
    state["signature"]["data"][1] = "0" * 16
    with pytest.raises(
        CheckpointError, match=r"^the examples of task cldr_number_en/train have changed since"
    ):
        pipeline("gsm8k", "cldr_number_en").restore(state)


def test_other_settings_are_refused_all_the_same(root):
    state = state_after(pipeline())
    state["signature"]["seed"] = 1
    with pytest.raises(CheckpointError, match="seed was 1, now it is 0"):
        pipeline(allow=True).restore(state)
    with pytest.raises(CheckpointError, match="tasks was"):
        pipeline("gsm8k", "cldr_number_en", allow=True).restore(state_after(pipeline()))


def test_a_state_of_an_older_version_has_no_files(root):
    state = state_after(pipeline())
    del state["signature"]["files"]
    pipeline().restore(state)
    write(root, 61)
    with pytest.raises(CheckpointError, match="the examples of task gsm8k/train have changed"):
        pipeline().restore(state)


@pytest.mark.parametrize("failures", [2, 3])
def test_a_network_file_system_gets_a_few_attempts(root, monkeypatch, failures):
    read, pauses = reading.files.read_bytes, []
    left = [failures]

    def read_bytes(path):
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read(path)

    monkeypatch.setattr(reading.files, "read_bytes", read_bytes)
    monkeypatch.setattr(reading.time, "sleep", pauses.append)
    if failures == 2:
        assert reading.read_bytes(root / FILE).startswith(b'{"question"')
    else:
        with pytest.raises(DataError) as error:
            reading.read_bytes(root / FILE)
        assert str(error.value) == f"{root / FILE}: {os.strerror(errno.ESTALE)}, in 3 attempts"
    assert pauses == [1.0, 2.0]


def test_what_is_not_there_is_not_tried_again(root, monkeypatch):
    monkeypatch.setattr(reading.time, "sleep", None)
    with pytest.raises(DataError, match="No such file"):
        reading.read_bytes(root / "nothing")

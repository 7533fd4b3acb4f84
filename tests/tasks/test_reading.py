"""Finding and reading data files: where they are, and what becomes of damaged rows."""

import json
import warnings
from pathlib import Path

import pytest

from sira_jax.errors import DataError
from tasks import reading


def parse(row):
    return {"inputs": reading.text_of(row, "q"), "targets": reading.text_of(row, "a", "text")}


def line(number):
    return json.dumps({"q": f"q{number}", "a": {"text": f"a{number}"}})


def write(path, lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_where_files_are(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "x.json").write_text("[]")
    monkeypatch.setenv("SIRA_DATA_DIR", str(tmp_path))
    assert reading.data_file("set", "x.json") == tmp_path / "set" / "x.json"
    with pytest.raises(DataError, match=r"set/y\.json is missing: run .*download_data\.py name`"):
        reading.data_file("set", "y.json", source="name")
    monkeypatch.delenv("SIRA_DATA_DIR")
    monkeypatch.setenv("SIRA_CACHE", str(tmp_path))
    assert reading.data_file("set", "x.json") == tmp_path / "set" / "x.json"


def test_json_lines(tmp_path):
    path = write(
        tmp_path / "x.jsonl", [line(1), "", '{"q": "\u2028", "a": 1}'.replace("1}", "{}}")]
    )
    with pytest.raises(DataError, match=r"line 3: q is empty"):
        reading.read_json_lines(path, parse)
    path.write_bytes(b"\xef\xbb\xbf" + f"{line(1)}\r\n{line(2)}".encode())
    assert reading.read_json_lines(path, parse) == [
        {"inputs": "q1", "targets": "a1"},
        {"inputs": "q2", "targets": "a2"},
    ]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{", "no JSON"),
        ("[1]", "no JSON object"),
        ('{"a": {"text": "x"}}', "q is no str"),
        ('{"q": "x", "a": "y"}', "a.text is no str"),
        ('{"q": "x", "a": {"text": " "}}', "a.text is empty"),
    ],
)
def test_a_damaged_line_is_counted_and_named(tmp_path, bad, reason):
    path = write(tmp_path / "x.jsonl", [*map(line, range(100)), bad, line(100)])
    with pytest.warns(reading.DamagedRowsWarning) as caught:
        examples = reading.read_json_lines(path, parse)
    assert [e["inputs"] for e in examples] == [f"q{n}" for n in range(101)]
    (message,) = [str(w.message) for w in caught]
    assert f"{path}: 1 of 102 lines damaged: line 101 (line 101: " in message
    assert reason in message


def test_many_damaged_lines_are_fatal(tmp_path, monkeypatch):
    path = write(tmp_path / "x.jsonl", [*map(line, range(98)), "{", "{", *["{"] * 11])
    with pytest.raises(
        DataError, match=r"13 of 111 .*lines 99, 100, .* 108, \.\.\. .*at most 1\.00%"
    ):
        reading.read_json_lines(path, parse)
    monkeypatch.setenv("SIRA_MAX_DAMAGED", "0.2")
    with pytest.warns(reading.DamagedRowsWarning):
        assert len(reading.read_json_lines(path, parse)) == 98
    monkeypatch.setenv("SIRA_MAX_DAMAGED", "2")
    with pytest.raises(DataError, match="SIRA_MAX_DAMAGED='2' is not allowed: a share from 0 to 1"):
        reading.read_json_lines(path, parse)


def test_sound_rows_that_are_no_examples_are_left_out_in_silence(tmp_path):
    path = write(tmp_path / "x.jsonl", map(line, range(4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = reading.read_json_lines(path, lambda row: None if row["q"] == "q1" else parse(row))
    assert [e["inputs"] for e in rows] == ["q0", "q2", "q3"]
    with pytest.raises(DataError, match=r"holds no examples \(4 lines\)"):
        reading.read_json_lines(path, lambda row: None)


def test_json_lists(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(f"[{line(1)}, {line(2)}]")
    assert [e["targets"] for e in reading.read_json_list(path, parse)] == ["a1", "a2"]
    path.write_text(f"[{line(1)}, 3]")
    with pytest.raises(DataError, match=r"1 of 2 items damaged: item 2 .*no JSON object"):
        reading.read_json_list(path, parse)
    path.write_text("{}")
    with pytest.raises(DataError, match="a dict where a JSON list should be"):
        reading.read_json_list(path, parse)
    path.write_text('[1,\n"x]')
    with pytest.raises(DataError, match=r"x\.json, line 2: no JSON"):
        reading.read_json_list(path, parse)


def test_encodings(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes("\ufeffঢাকা".encode())
    assert reading.read_text(path) == "ঢাকা"
    path.write_bytes("a\nSão".encode("latin-1"))
    assert reading.read_text(path, fallback="latin-1") == "a\nSão"
    with pytest.raises(DataError, match=r"x\.txt, line 2: not UTF-8"):
        reading.read_text(path)
    assert reading.read_text(path, by_row=True) == "a\nS\udce3o"
    with pytest.raises(DataError, match="not UTF-8"):
        reading.check_utf8("S\udce3o")
    reading.check_utf8("São")
    with pytest.raises(
        DataError, match=r"^\S+x\.txt, line 2: not UTF-8 \(invalid continuation byte\)$"
    ):
        reading.read_json(path)
    with pytest.raises(DataError, match="No such file"):
        reading.read_text(Path(tmp_path / "y.txt"))


def test_carving_keeps_equal_inputs_together():
    examples = [{"inputs": f"q{n // 2}", "targets": str(n)} for n in range(2000)]
    train = reading.carve(examples, "train", share=10, name="x")
    validation = reading.carve(examples, "validation", share=10, name="x")
    assert len(train) + len(validation) == 2000
    # 1000 inputs at 10 %: within five standard deviations.
    assert 2 * 52 <= len(validation) <= 2 * 148
    assert not {e["inputs"] for e in train} & {e["inputs"] for e in validation}
    assert reading.carve(examples, "validation", share=10, name="y") != validation
    assert [e for e in examples if e in train] == train

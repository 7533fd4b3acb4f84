"""The downloaded tasks on hand-written files of their upstream forms."""

import json

import pytest

from sira_jax.errors import DataError
from tasks import bengali_ner, reading, specs, xtreme_up
from tasks.loading import load_mixture, load_task
from tasks.metrics import evaluate
from tests.tasks import datasets

THERE = [
    "snips",
    "gsm8k",
    "banking77",
    "bengali_ner",
    "xtreme_up_ner_sw",
    "xtreme_up_qa_in_lang_bn",
    "forumsum",
    "finqa",
    "mtop_de",
    "dialogsum",
    "xtreme_up_qa_cross_lang_bn",
    "xtreme_up_semantic_parsing_sw",
    "afriqa_ha",
    "afriqa_yo",
]


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("SIRA_DATA_DIR", str(tmp_path))
    datasets.write_all(tmp_path)
    return tmp_path


def first(task, split="test"):
    return specs.get_task(task).examples(split)[0]


@pytest.mark.parametrize("task", THERE)
@pytest.mark.parametrize("split", specs.SPLITS)
def test_the_target_itself_scores_full_marks(data, task, split):
    """Every split loads, has the declared fields, and each metric gives the right answer 100."""
    spec = specs.get_task(task)
    examples = spec.examples(split)
    for example in examples:
        assert set(example) == {"inputs", "targets", *spec.extra_fields}
        assert all(isinstance(value, str) for value in example.values())
    right = [example["targets"] for example in examples]
    scores = evaluate(spec.metrics, right, examples)
    several = task == "dialogsum" and split == "test"
    assert all(score == pytest.approx(100) for score in scores.values()) != several
    wrong = evaluate(spec.metrics, ["zzz"] * len(examples), examples)
    assert all(wrong[name] < scores[name] for name in wrong if name != "boolean_accuracy")


def test_snips(data):
    assert first("snips") == {
        "inputs": "AddToPlaylist 0 São Paulo now",
        "targets": "[IN:AddToPlaylist [SL:city São Paulo ] [SL:timeRange now ] ]",
    }
    spec = specs.get_task("snips")
    assert spec.size("train") + spec.size("validation") == 7 * 40
    assert len(spec.examples("test")) == 7


def test_a_snips_slot_without_a_name(data):
    path = data / "snips/validate_GetWeather.json"
    datasets.write_json(path, {"GetWeather": [{"data": [{"text": "x", "entity": None}]}]})
    with pytest.raises(DataError, match="item 1: entity is no str"):
        specs.get_task("snips").examples("test")


def test_gsm8k(data):
    assert first("gsm8k") == {"inputs": "0 and 0?", "targets": "so\n#### 0"}
    datasets.write_lines(data / "gsm8k/test.jsonl", [{"question": "?", "answer": "18"}])
    with pytest.raises(DataError, match=r"line 1: answer has no number after ####"):
        specs.get_task("gsm8k").examples("test")


def test_banking77(data):
    assert first("banking77") == {"inputs": "Where, 0 is it?", "targets": "card_arrival"}
    (data / "banking77/test.csv").write_text("text,category\na,b\nc\n")
    with pytest.raises(DataError, match=r"1 of 2 lines damaged: line 3 .*1 cells"):
        specs.get_task("banking77").examples("test")
    # A row that is not UTF-8 is one damaged row.
    rows = b"a,b\n" * 100 + b"S\xe3o,b\n" + b"c,d\n"
    (data / "banking77/test.csv").write_bytes(b"text,category\n" + rows)
    with pytest.warns(reading.DamagedRowsWarning, match=r"1 of 102 lines .*line 102: not UTF-8"):
        examples = specs.get_task("banking77").examples("test")
    assert len(examples) == 101
    (data / "banking77/test.csv").write_text("a,b\n")
    with pytest.raises(DataError, match=r"line 1: .* where the columns"):
        specs.get_task("banking77").examples("test")


def test_ner(data):
    """Spans are of bytes, and a tab in the text is a space."""
    assert specs.get_task("xtreme_up_ner_sw").examples("test") == [
        {"inputs": "Wizara ya Kenya, Nairobi: Ọla", "targets": "LOC: Kenya $$ PER: Ọla"},
        {"inputs": "Wizara ya Kenya, Nairobi: Ọla", "targets": ""},
    ]


@pytest.mark.parametrize(
    ("span", "reason"),
    [
        ({"start_byte": 26, "limit_byte": 27}, "cuts a character"),
        ({"start_byte": 5, "limit_byte": 99}, "span 5:99 of a text of 31 bytes"),
        ({"start_byte": 5, "limit_byte": 5}, "span 5:5 of a text"),
        ({"start_byte": 5}, "limit_byte is no int"),
        ({"start_byte": False, "limit_byte": 5}, "start_byte is no int"),
    ],
)
def test_bad_spans(data, span, reason):
    row = datasets.NER | {"spans": [span | {"label": "PER"}]}
    datasets.write_lines(data / "ner_masakhaner_x/test/sw.jsonl", [row])
    with pytest.raises(DataError, match=f"line 1: {reason}|line 1: .*{reason}"):
        specs.get_task("xtreme_up_ner_sw").examples("test")


def test_bengali_ner(data):
    assert specs.get_task("bengali_ner").examples("test")[:2] == [
        {
            "inputs": "ঢাকা শহরে রহিম করিম ২০০৭ সালে ।",
            "targets": "LOC: ঢাকা শহরে $$ PER: রহিম $$ PER: করিম $$ TIM: ২০০৭ সালে",
        },
        {"inputs": "হয়", "targets": ""},
    ]
    (data / "ner_bengali/test_data.txt").write_text("ক\tO\n\n\nখ\tO\nগ\t\n")
    with pytest.raises(DataError, match=r"1 of 2 sentences damaged: line 5 .*is no token, tab"):
        specs.get_task("bengali_ner").examples("test")


def test_bengali_ner_that_is_not_utf8(data):
    path = data / "ner_bengali/test_data.txt"
    path.write_bytes("ক\tO\nখ\tO\n\n".encode() * 100 + b"a\tO\n\xe9\tO\n")
    with pytest.warns(reading.DamagedRowsWarning, match=r"1 of 101 sen.*line 302: not UTF-8"):
        examples = specs.get_task("bengali_ner").examples("test")
    assert len(examples) == 100


def test_entities_by_hand():
    tags = ["I-PER", "I-PER", "I-LOC", "B-LOC", "O", "TIM", "I-ORG", "B-ORG"]
    assert bengali_ner.entities("abcdefgh", tags) == [
        ("PER", "a b"),
        ("LOC", "c"),
        ("LOC", "d"),
        ("TIM", "f"),
        ("ORG", "g"),
        ("ORG", "h"),
    ]


def test_xtreme_up_qa(data):
    expected = "question: nani? title: Nile context: Mto mrefu."
    assert first("xtreme_up_qa_in_lang_bn") == {"inputs": expected, "targets": "Mto"}
    untitled = specs.get_task("xtreme_up_qa_cross_lang_bn").examples("test")[1]
    assert untitled["inputs"] == "question: nani? title:  context: Mto mrefu."


def test_xtreme_up_semantic_parsing_has_no_prompt(data):
    expected = {"inputs": "piga Ali", "targets": "[IN:CREATE_CALL [SL:CONTACT Ali ] ]"}
    assert first("xtreme_up_semantic_parsing_sw") == expected


def test_xtreme_up_headline_score():
    """fi, ko, ru, ar and en do not count; of in-language QA that leaves bn, id, sw and te."""
    scores = {xtreme_up.task_name("qa_in_lang", c): 100.0 for c in ("ar", "fi", "ko", "ru", "en")}
    scores |= {
        xtreme_up.task_name("qa_in_lang", c): n
        for c, n in {"bn": 1.0, "id": 2.0, "sw": 3.0, "te": 4.0}.items()
    }
    assert xtreme_up.under_represented_mean("qa_in_lang", scores) == 2.5
    assert not xtreme_up.is_under_represented("ta_cs")
    assert not xtreme_up.is_under_represented("pt_br")
    with pytest.raises(DataError, match=r"needs the scores of .*xtreme_up_qa_in_lang_sw"):
        xtreme_up.under_represented_mean("qa_in_lang", {})
    with pytest.raises(DataError, match="task='qa' of XTREME-UP is not allowed"):
        xtreme_up.under_represented_mean("qa", {})


def test_finqa(data):
    example = first("finqa")
    expected = "question: what is the growth of net sales? context: net sales grew . in 2008 ."
    assert example["inputs"] == expected
    assert example["targets"] == "subtract(120, 100), divide(#0, 100)"
    assert json.loads(example["table"])[1] == ["net sales", "$ 120", "$ 100"]
    scores = evaluate(["execution_accuracy", "program_accuracy"], ["divide(20, 100)"], [example])
    assert scores == {"execution_accuracy": 100.0, "program_accuracy": 0.0}


def test_finqa_without_retrieved_facts(data):
    qa = {k: v for k, v in datasets.FINQA["qa"].items() if k != "model_input"}
    datasets.write_json(data / "finqa/test.json", [datasets.FINQA | {"qa": qa}])
    assert first("finqa")["inputs"].endswith(
        "context: net sales were 120 in 2008 and 100 in 2007 ."
    )


@pytest.mark.parametrize("facts", [{}, {"gold_inds": {}}, {"gold_inds": {}, "model_input": []}])
def test_finqa_without_any_facts_has_the_page(data, facts):
    """Upstream's context without a retriever: texts, then a sentence a row, without leaders."""
    qa = {k: datasets.FINQA["qa"][k] for k in ("question", "program", "exe_ans")} | facts
    page = {"pre_text": ["sales . . . . . . grew .", "a ."], "post_text": ["b ."], "qa": qa}
    table = [["in millions", "2008", "2007"], ["net  sales", "$ 120", "$ 100"], ["costs", "7", ""]]
    datasets.write_json(data / "finqa/test.json", [datasets.FINQA | page | {"table": table}])
    assert first("finqa")["inputs"] == (
        "question: what is the growth of net sales? context: sales  grew . a . b ."
        " in millions the net sales of 2008 is $ 120 ; the net sales of 2007 is $ 100 ;"
        " in millions the costs of 2008 is 7 ; the costs of 2007 is ;"
    )
    datasets.write_json(data / "finqa/test.json", [{"table": [], "qa": qa}])
    with pytest.raises(DataError, match="item 1: pre_text is no list"):
        specs.get_task("finqa").examples("test")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"program": "120 - 100"}, "qa.program='120 - 100': no step at '120 - 100'"),
        ({"exe_ans": None}, "qa.exe_ans=None: a finite number, yes or no"),
        ({"exe_ans": float("nan")}, "qa.exe_ans=nan: a finite number, yes or no"),
        ({"question": ""}, "question is empty"),
        ({"model_input": [["x"]]}, "qa.model_input is no list of"),
    ],
)
def test_bad_finqa_items(data, changes, reason):
    row = datasets.FINQA | {"qa": datasets.FINQA["qa"] | changes}
    datasets.write_json(data / "finqa/test.json", [row])
    with pytest.raises(DataError, match=f"item 1: {reason}"):
        specs.get_task("finqa").examples("test")


def test_afriqa(data):
    assert first("afriqa_ha") == {
        "inputs": "question: Ina 0? title: Kano context: Kano is a city.",
        "targets": "a city",
    }
    # Rows without a passage are no examples.
    assert specs.get_task("afriqa_ha").size("train") == 60
    yoruba = specs.get_task("afriqa_yo")
    assert yoruba.size("train") + yoruba.size("validation") == 60
    with pytest.raises(DataError, match=r"split='train' of task afriqa_sw: it has \['test'\]"):
        specs.get_task("afriqa_sw").examples("train")


def test_mtop(data):
    assert first("mtop_de") == {"inputs": "ruf Ann an", "targets": "[IN:CALL [SL:X Ann ] ] de"}
    with pytest.raises(DataError, match=r"item 1: question\.fr is no str"):
        specs.get_task("mtop_fr").examples("test")


def test_dialogsum(data):
    example = first("dialogsum")
    assert example["inputs"] == "#Person1#: Hi.\n#Person2#: Hello."
    assert example["targets"] == "Summary 1."
    assert json.loads(example["references"]) == ["Summary 1.", "Summary 2.", "Summary 3."]
    assert json.loads(first("dialogsum", "train")["references"]) == ["They meet."]


def test_forumsum(data):
    expected = {"inputs": "A: x y\nB: z", "targets": "A asks B."}
    assert first("forumsum") == expected
    columns = {"utterances": {"author": ["A", "B"], "text": ["x y", "z"]}, "summary": "A asks B."}
    datasets.write_lines(data / "forumsum/test.jsonl", [columns])
    assert first("forumsum") == expected
    for utterances in ([], {"author": ["A"], "text": []}, [{"author": "A"}], "x"):
        datasets.write_lines(data / "forumsum/test.jsonl", [columns | {"utterances": utterances}])
        with pytest.raises(DataError, match="line 1: utterances"):
            specs.get_task("forumsum").examples("test")


def test_missing_files_name_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("SIRA_DATA_DIR", str(tmp_path))
    for spec in specs.TASKS.values():
        if spec.language:
            with pytest.raises(
                DataError, match=r"is missing: run `python scripts/download_data\.py"
            ):
                spec.examples("test")


def test_tasks_of_every_language():
    tasks = set(specs.TASKS)
    assert {f"xtreme_up_semantic_parsing_{c}" for c in ("sw", "bn", "bn_cs", "pt_br")} <= tasks
    counts = {group: sum(s.group == group for s in specs.TASKS.values()) for group in GROUPS}
    assert counts == GROUPS


GROUPS = {
    "xtreme_up_semantic_parsing": 24,
    "xtreme_up_qa_in_lang": 9,
    "xtreme_up_qa_cross_lang": 26,
    "xtreme_up_ner": 20,
    "mtop": 6,
    "afriqa": 9,
}


def test_mixtures():
    assert len(specs.MIXTURES["xtreme_up_ner"].tasks) == 20
    assert "afriqa_sw" not in specs.MIXTURES["afriqa"].tasks
    assert set(specs.MIXTURES["multitask_sw"].tasks) == {
        f"xtreme_up_{task}_sw" for task in ("semantic_parsing", "qa_in_lang", "ner")
    }
    assert set(specs.MIXTURES["multitask_bn"].tasks) == {
        "bengali_ner",
        *(f"xtreme_up_{task}_bn" for task in ("semantic_parsing", "qa_in_lang", "qa_cross_lang")),
    }
    assert {"finqa", "forumsum", "gsm8k"} <= set(specs.MIXTURES["multitask_en"].tasks)
    assert len(specs.MIXTURES["xtreme_up"].tasks) == 24 + 9 + 26 + 20
    everything = specs.MIXTURES["multitask_all"].tasks
    assert len(everything) == sum(GROUPS.values()) - 1 + 7
    assert not any(name.startswith(("cldr", "bfcl")) for name in everything)


def test_rates_from_the_files(data, monkeypatch):
    monkeypatch.setitem(
        specs._MIXTURES,
        "two",
        specs.MixtureSpec(name="two", description="d", tasks=("finqa", "gsm8k"), rates=(1.0, 1.0)),
    )
    train = specs.get_task("gsm8k").size("train")
    assert load_mixture("two", "train", "bytes")[1] == [1.0, 1.0]
    assert load_mixture("two", "train", "bytes", mixing="proportional")[1] == [1.0, train]
    _, rates = load_mixture("two", "train", "bytes", mixing="temperature", temperature=2.0)
    assert rates == [1.0, pytest.approx(train**0.5)]
    assert [len(task) for task in load_mixture("two", "test", "bytes")[0]] == [1, 3]
    assert load_task("finqa", "train", "bytes").examples[0]["exe_ans"] == "0.2"

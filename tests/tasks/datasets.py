"""Small hand-written files in the forms of the upstream data sets."""

import json
from pathlib import Path

from tasks import snips

FINQA = {
    "id": "X/2008/page_1.pdf-1",
    "pre_text": ["."],
    "post_text": ["."],
    "table": [["", "2008", "2007"], ["net sales", "$ 120", "$ 100"]],
    "qa": {
        "question": "what is the growth of net sales?",
        "answer": "20%",
        "program": "subtract(120, 100), divide(#0, 100)",
        "exe_ans": 0.2,
        "gold_inds": {"table_1": "net sales were 120 in 2008 and 100 in 2007 ."},
        "model_input": [["table_1", "net sales grew ."], ["text_3", "in 2008 ."]],
    },
}
NER = {
    "text": "Wizara ya\tKenya, Nairobi: Ọla",
    "spans": [
        {"start_byte": 10, "limit_byte": 15, "label": "LOC"},
        {"start_byte": 26, "limit_byte": 31, "label": "PER"},
    ],
    "target": "",
}
QA = {"question": "nani?", "title": "Nile", "context": "Mto mrefu.", "target": "Mto", "id": "1"}
AFRIQA = {
    "id": "0",
    "title": "Kano",
    "context": "Kano is a city.",
    "question_lang": "Ina Kano?",
    "question_translated": "Where is Kano?",
    "answer_lang": "Nijeriya",
    "answer_pivot": {"text": ["a city", "city"], "answer_start": [8]},
}
MTOP = {
    "id": "1",
    "question": {"en": "call Ann", "de": "ruf Ann an"},
    "mr": {"slot_intent": {"en": "[IN:CALL [SL:X Ann ] ]", "de": "[IN:CALL [SL:X Ann ] ] de"}},
}
BENGALI = "\ufeffঢাকা\tB-LOC\nশহরে\tI-LOC\nরহিম\tB-PER\nকরিম\tB-PER\n২০০৭\tTIM\t\nসালে\tTIM\n।\tO\n\nহয়\tO\n\n"


def write_lines(path: Path, rows) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_json(path: Path, value) -> None:
    """One JSON value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_snips(folder: Path) -> None:
    """40 requests an intent to train on, 1 to test; one file in Latin-1."""
    for intent in snips.INTENTS:
        for name, count in ((f"train_{intent}_full", 40), (f"validate_{intent}", 1)):
            rows = [
                {
                    "data": [
                        {"text": f"{intent} {n} "},
                        {"text": "São\nPaulo", "entity": "city"},
                        {"text": " now", "entity": "timeRange"},
                        {"text": " \n"},
                    ]
                }
                for n in range(count)
            ]
            text = json.dumps({intent: rows}, ensure_ascii=False)
            folder.mkdir(parents=True, exist_ok=True)
            encoding = "latin-1" if intent == "PlayMusic" else "utf-8"
            (folder / f"{name}.json").write_text(text, encoding=encoding)


def write_all(root: Path) -> None:
    """Every data set, with few languages."""
    write_snips(root / "snips")
    problems = [{"question": f"{n} and {n}?", "answer": f"so\n#### {2 * n}"} for n in range(100)]
    write_lines(root / "gsm8k/train.jsonl", problems)
    write_lines(root / "gsm8k/test.jsonl", problems[:3])
    for name, count in (("train", 100), ("test", 2)):
        rows = "".join(f'"Where, {n}\nis it?",card_arrival\r\n' for n in range(count))
        (root / "banking77").mkdir(exist_ok=True)
        (root / "banking77" / f"{name}.csv").write_text(f"text,category\r\n{rows}", newline="")
        (root / "ner_bengali").mkdir(exist_ok=True)
        (root / "ner_bengali" / f"{name}_data.txt").write_text(
            BENGALI + "".join(f"শব্দ{n}\tB-LOC\n\n" for n in range(count))
        )
    for split in ("train", "validation", "test"):
        write_lines(root / f"ner_masakhaner_x/{split}/sw.jsonl", [NER, NER | {"spans": []}])
        for task in ("qa_in_lang", "qa_cross_lang"):
            write_lines(root / f"xtreme_up/{task}/{split}/bn.jsonl", [QA, QA | {"title": ""}])
        parsing = {"input": "piga Ali", "target": "[IN:CREATE_CALL [SL:CONTACT Ali ] ]"}
        write_lines(root / f"xtreme_up/semantic_parsing/{split}/sw.jsonl", [parsing])
        thread = {"utterances": [{"author": "A", "text": "x\ny"}, {"author": "B", "text": "z"}]}
        write_lines(root / f"forumsum/{split}.jsonl", [thread | {"summary": "A asks B."}])
    for name in ("train", "dev", "test"):
        write_json(root / f"finqa/{name}.json", [FINQA])
        write_json(root / f"mtop_xsemplr/{name}.json", [MTOP])
        for code in ("hau", "yor", "swa"):
            prefix = f"afriqa_goldp/gold_span_passages.afriqa.{code}.en"
            rows = [AFRIQA | {"question_lang": f"Ina {n}?"} for n in range(60)]
            write_lines(root / f"{prefix}.{name}.json", [*rows, AFRIQA | {"context": None}])
        summaries = {"summary": "They meet."}
        if name == "test":
            summaries = {f"summary{n}": f"Summary {n}." for n in (1, 2, 3)}
        dialogue = {"dialogue": "#Person1#: Hi.\n#Person2#: Hello.\n", "topic": "t"}
        write_lines(root / f"dialogsum/dialogsum.{name}.jsonl", [dialogue | summaries])

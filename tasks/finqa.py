"""FinQA: a question on a financial report to the program that answers it (Chen et al. 2021, czyssrs/FinQA, MIT).

Files: finqa/{train,dev,test}.json, upstream's lists. The input is the question and the retrieved facts, since a whole
page is thousands of tokens long: `qa.model_input`, the facts upstream gives its own generator, or the gold facts
`qa.gold_inds` of an example without them. An example with neither has the whole page: `pre_text`, `post_text` and the
table's rows as sentences, as upstream's generator without a retriever. The target is `qa.program`. `exe_ans` and
`table` (both as JSON) are for execution accuracy.
"""

import json
from collections.abc import Mapping, Sequence

from sira_jax.errors import DataError
from tasks import reading, specs
from tasks.finqa_program import check_example

FOLDER = "finqa"
# Dots and asterisks that lead the eye to a number; upstream takes them out of the context.
_LEADERS = (". . . . . .", "* * * * * *")
FILES: Mapping[str, str] = {"train": "train.json", "validation": "dev.json", "test": "test.json"}


def _row_text(header: Sequence[str], row: Sequence[str]) -> str:
    """Upstream's sentence of a table's row: `the net sales of 2008 is $ 120 ;` for each of its cells."""
    cells = (f"the {row[0]} of {h} is {c} ;" for h, c in zip(header[1:], row[1:], strict=False))
    return " ".join(" ".join([header[0], *cells]).split())


def _page(row: Mapping, table: Sequence[Sequence[str]]) -> list[str]:
    texts = [*reading.value_of(row, list, "pre_text"), *reading.value_of(row, list, "post_text")]
    rows = [cells for cells in table if cells]
    return texts + [_row_text(rows[0], cells) for cells in rows[1:]]


def _facts(row: Mapping, table: Sequence[Sequence[str]]) -> list[str]:
    qa = row["qa"]
    retrieved = qa.get("model_input")
    if retrieved:
        are_listed = isinstance(retrieved, list)
        if not are_listed or not all(
            isinstance(fact, list) and len(fact) == 2 for fact in retrieved
        ):
            raise DataError("qa.model_input is no list of [name, text]")
        facts = [fact[1] for fact in retrieved]
    elif qa.get("gold_inds"):
        facts = list(reading.value_of(row, dict, "qa", "gold_inds").values())
    else:
        facts = _page(row, table)
    if not all(isinstance(fact, str) for fact in facts):
        raise DataError("the context holds something that is no text")
    return facts


def _example(row: Mapping) -> specs.Example:
    qa = reading.value_of(row, dict, "qa")
    table = reading.value_of(row, list, "table")
    if not all(isinstance(r, list) and all(isinstance(c, str) for c in r) for r in table):
        raise DataError("table is no list of rows of texts")
    question, program = reading.text_of(qa, "question"), reading.text_of(qa, "program")
    check_example(qa)
    context = " ".join(_facts(row, table)).strip()
    for leaders in _LEADERS:
        context = context.replace(leaders, "")
    return {
        "inputs": f"question: {question} context: {context}",
        "targets": program,
        "table": json.dumps(table, ensure_ascii=False),
        "exe_ans": json.dumps(qa["exe_ans"]),
    }


def load(split: str) -> list[specs.Example]:
    """The examples of a split. Raises DataError for missing or damaged files."""
    return reading.read_json_list(reading.data_file(FOLDER, FILES[split]), _example)


specs.add_task(
    specs.TaskSpec(
        name="finqa",
        description="FinQA: the program that answers a question on a financial report",
        source=load,
        metrics=("execution_accuracy", "program_accuracy"),
        sizes=dict.fromkeys(specs.SPLITS),
        extra_fields=("table", "exe_ans"),
        language="en",
    )
)

"""XTREME-UP: semantic parsing, in-language and cross-language QA (Ruder et al. 2023, google-research/xtreme-up).

Files: xtreme_up/<task>/{train,validation,test}/<language>.jsonl, as in upstream's archive xtreme-up-v1.1.jsonl.tgz.
NER, the fourth of its tasks here, comes from elsewhere: `tasks.masakhaner`. Names are
`xtreme_up_semantic_parsing_sw`, `xtreme_up_qa_in_lang_sw`, `xtreme_up_qa_cross_lang_bn`, with upstream's language
codes: `_cs` marks code-switched data.

Inputs and targets are those of upstream's preprocessing (baseline/jsonl_to_seqio_tsv_lib.py): semantic parsing has
`input` and `target` unchanged, without a prompt; QA has `question: ... title: ... context: ...` and the answer, or
`No Answer`.
"""

import functools
from collections.abc import Callable, Mapping

from sira_jax.errors import DataError
from tasks import masakhaner, reading, specs
from tasks.masakhaner import codes

FOLDER = "xtreme_up"
LANGUAGES: Mapping[str, tuple[str, ...]] = {
    "semantic_parsing": codes(
        "am be bn bn_cs fi ha hi_cs hu ja pt_br ru sw ta ta_cs tr yo zu de_localized"
        " en de es fr hi th"
    ),
    "qa_in_lang": codes("ar bn fi id ko ru sw te en"),
    "qa_cross_lang": codes(
        "ar bn fi ko ru te as bho brx gbm gom gu hi hne kn mai ml mni mr mwr or pa ps sa ta ur"
    ),
}
# Of the languages here, those that XTREME-UP counts as well represented: its headline scores leave them out.
WELL_REPRESENTED = frozenset(codes("ar de en es fi fr hi hu ja ko pt ru tr"))


def qa_input(question: str, title: str, context: str) -> str:
    """The input of XTREME-UP's question answering."""
    return f"question: {question} title: {title} context: {context}"


def _parsing_example(row: Mapping) -> specs.Example:
    return {"inputs": reading.text_of(row, "input"), "targets": reading.text_of(row, "target")}


def _qa_example(row: Mapping) -> specs.Example:
    # A title may be empty.
    title = reading.value_of(row, str, "title")
    fields = (reading.text_of(row, "question"), title, reading.text_of(row, "context"))
    return {"inputs": qa_input(*fields), "targets": reading.text_of(row, "target")}


# Of each task: what makes an example, its metrics, and words for listings.
_KINDS: Mapping[str, tuple[Callable[[Mapping], specs.Example], tuple[str, ...], str]] = {
    "semantic_parsing": (_parsing_example, ("sequence_accuracy",), "semantic parsing"),
    "qa_in_lang": (_qa_example, ("squad", "boolean_accuracy"), "in-language QA"),
    "qa_cross_lang": (_qa_example, ("squad", "boolean_accuracy"), "cross-language QA"),
}


def load(task: str, language: str, split: str) -> list[specs.Example]:
    """The examples of a task in a language. Raises DataError for missing or damaged files."""
    path = reading.data_file(FOLDER, f"{task}/{split}/{language}.jsonl")
    return reading.read_json_lines(path, _KINDS[task][0])


def task_name(task: str, language: str) -> str:
    """The name of the task in a language, which may not exist."""
    return f"xtreme_up_{task}_{language}"


def is_under_represented(language: str) -> bool:
    """Whether XTREME-UP's headline scores count a language: neither well represented nor code-switched."""
    return not language.endswith("_cs") and language.split("_")[0] not in WELL_REPRESENTED


def under_represented_mean(task: str, scores: Mapping[str, float]) -> float:
    """XTREME-UP's headline score of a task: the mean over its under-represented languages.

    Args:
      task: "ner" or a key of LANGUAGES.
      scores: task name -> score; other tasks' scores are ignored.

    Raises:
      DataError: an unknown task, or the score of such a language is missing.
    """
    languages = {"ner": masakhaner.LANGUAGES, **LANGUAGES}
    if task not in languages:
        raise DataError(f"task={task!r} of XTREME-UP is not allowed: use one of {list(languages)}")
    names = [task_name(task, code) for code in languages[task] if is_under_represented(code)]
    missing = [name for name in names if name not in scores]
    if missing:
        raise DataError(f"the mean over XTREME-UP {task} needs the scores of {missing}")
    return sum(scores[name] for name in names) / len(names)


for _task, (_, _metrics, _words) in _KINDS.items():
    for _language in LANGUAGES[_task]:
        specs.add_task(
            specs.TaskSpec(
                name=task_name(_task, _language),
                description=f"XTREME-UP {_words}, language {_language}",
                source=functools.partial(load, _task, _language),
                metrics=_metrics,
                sizes=dict.fromkeys(specs.SPLITS),
                group=f"xtreme_up_{_task}",
                language=_language,
            )
        )

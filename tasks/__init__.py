"""Tasks: data, vocabularies, prompt templates, input pipeline and metrics.

Importing this package defines all tasks and mixtures and imports neither TensorFlow nor seqio.
`tasks.registry` (or the names `bind`, `HuggingFaceVocabulary` below, on first use) imports seqio
and registers them there, after which `seqio.get_mixture_or_task("cldr_date_sw")` works.
"""

import importlib
from typing import Any

from tasks import bfcl, cldr, multitask, starter  # noqa: F401 - each defines its tasks on import
from tasks.converters import DecoderFeatures, EncoderDecoderFeatures
from tasks.features import LmExample, make_example, pack_rows, unpack
from tasks.loading import TokenizedTask, load_mixture, load_task
from tasks.metrics import METRICS, evaluate
from tasks.pipeline import InputPipeline, eval_batches
from tasks.specs import MIXTURES, TASKS
from tasks.templates import ChatTemplate, PlainTemplate, make_template
from tasks.vocabularies import make_vocabulary

_LAZY = {
    "bind": "tasks.registry",
    "HuggingFaceVocabulary": "tasks.seqio_vocabularies",
}

__all__ = [
    "METRICS",
    "MIXTURES",
    "TASKS",
    "ChatTemplate",
    "DecoderFeatures",
    "EncoderDecoderFeatures",
    "HuggingFaceVocabulary",
    "InputPipeline",
    "LmExample",
    "PlainTemplate",
    "TokenizedTask",
    "bind",
    "eval_batches",
    "evaluate",
    "load_mixture",
    "load_task",
    "make_example",
    "make_template",
    "make_vocabulary",
    "pack_rows",
    "unpack",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

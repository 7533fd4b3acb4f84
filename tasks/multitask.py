"""Mixtures of the downloaded tasks: one task in all languages, all tasks of a language, all tasks.

* `xtreme_up_ner`, `xtreme_up_qa_in_lang`, `mtop`, `afriqa` and so on: one task, all its languages (multilingual).
* `multitask_sw`: all tasks of a language that has more than one (multitask). Code-switched and localised data are
  languages of their own.
* `xtreme_up`: all of XTREME-UP; `multitask_all`: everything.

Tasks without training or validation data are left out. Rates are equal, since the sizes are known only once the files
are there; training takes proportional or temperature-scaled rates by `data.rates`.
"""

from collections import defaultdict
from collections.abc import Iterable

from tasks import (
    afriqa,
    banking77,
    bengali_ner,
    dialogsum,
    finqa,
    forumsum,
    gsm8k,
    masakhaner,
    mtop,
    snips,
    specs,
    xtreme_up,
)

MODULES = (
    finqa,
    forumsum,
    xtreme_up,
    masakhaner,
    dialogsum,
    gsm8k,
    snips,
    banking77,
    mtop,
    afriqa,
    bengali_ner,
)


def _add(name: str, description: str, tasks: Iterable[str]) -> None:
    names = tuple(tasks)
    specs.add_mixture(
        specs.MixtureSpec(
            name=name, description=description, tasks=names, rates=(1.0,) * len(names)
        )
    )


def _register() -> None:
    tasks = [
        spec
        for spec in specs.TASKS.values()
        if spec.language and set(specs.SPLITS) <= {*spec.sizes}
    ]
    groups, languages = defaultdict(list), defaultdict(list)
    for spec in tasks:
        languages[spec.language].append(spec.name)
        if spec.group:
            groups[spec.group].append(spec.name)
    for group, names in groups.items():
        _add(group, f"{group.replace('_', ' ')}, all languages", names)
    for language, names in languages.items():
        if len(names) > 1:
            _add(f"multitask_{language}", f"all downloaded tasks in language {language}", names)
    of_xtreme_up = [spec.name for spec in tasks if spec.group.startswith("xtreme_up")]
    _add("xtreme_up", "all XTREME-UP tasks, all languages", of_xtreme_up)
    _add("multitask_all", "all downloaded tasks, all languages", [spec.name for spec in tasks])


_register()

"""Localisation tasks generated from the CLDR data inside the Babel package: no download.

A task is a kind of text and a language: `cldr_date_sw` writes a date in full in Swahili. Kind x
language gives a multitask, multilingual mixture of short sequences whose answers are unambiguous:
`cldr_all`, one mixture a kind (`cldr_date`) and one a language (`cldr_sw`), at equal rates.

* A pair exists where Babel holds the language's own data for at least half of the kind's items;
  within a pair only those items are used. Babel has too few units for Yoruba, Zulu and Igbo, for
  example, so there is no `cldr_unit_yo`.
* The split of an example is a hash of what is written (the date; the value and its unit) and never
  of the language: no value is trained on in one language and tested in another. The order within a
  split is a hash too. No random generator takes part, so that one Babel release gives the same data
  on every machine.
* Targets are Babel's output unchanged, no-break spaces, joiners and direction marks included.

Source: Unicode CLDR (Unicode License v3) through Babel (BSD-3-Clause).
"""

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from babel import Locale, localedata

from sira_jax.errors import DataError
from tasks import specs
from tasks.cldr_kinds import KINDS, Kind, Value, digest

LANGUAGES: Mapping[str, str] = {
    "af": "Afrikaans",
    "am": "Amharic",
    "ar": "Arabic",
    "bn": "Bengali",
    "de": "German",
    "en": "English",
    "es": "Spanish",
    "fi": "Finnish",
    "fr": "French",
    "ha": "Hausa",
    "hi": "Hindi",
    "id": "Indonesian",
    "ig": "Igbo",
    "ja": "Japanese",
    "ko": "Korean",
    "mr": "Marathi",
    "pt": "Portuguese",
    "ru": "Russian",
    "so": "Somali",
    "sw": "Swahili",
    "ta": "Tamil",
    "te": "Telugu",
    "ur": "Urdu",
    "vi": "Vietnamese",
    "yo": "Yoruba",
    "zh": "Chinese",
    "zu": "Zulu",
}

# At most so many examples a task. Validation takes 10 % of the values and test 15 %.
MAX_EXAMPLES: Mapping[str, int] = {"train": 2000, "validation": 100, "test": 200}
_VALIDATION_SHARE, _TEST_SHARE = 10, 15
# A language has a kind where it has this share of the kind's items.
_MIN_ITEM_SHARE = 0.5


def split_of(kind: str, text: str) -> str:
    """The split of a value of `kind`, from its text alone."""
    draw = digest("split", kind, text) % 100
    if draw < _VALIDATION_SHARE:
        return "validation"
    return "test" if draw < _VALIDATION_SHARE + _TEST_SHARE else "train"


@functools.cache
def _values_by_split(kind: str) -> Mapping[str, Sequence[Value]]:
    """All distinct values of a kind, each split in its fixed order."""
    splits: dict[str, list[Value]] = {split: [] for split in specs.SPLITS}
    for value in {value.text: value for value in KINDS[kind].values()}.values():
        splits[split_of(kind, value.text)].append(value)
    for values in splits.values():
        values.sort(key=lambda value: (digest("order", kind, value.text), value.text))
    return splits


@functools.cache
def _item_counts(kind: str) -> Mapping[str, Counter]:
    return {
        split: Counter(value.item for value in values)
        for split, values in _values_by_split(kind).items()
    }


@functools.cache
def items(kind: str, language: str) -> frozenset[str]:
    """The items of `kind` for which Babel holds the language's own data; empty where too few."""
    if not localedata.exists(language):
        return frozenset()
    every = set().union(*_item_counts(kind).values())
    locale = Locale.parse(language)
    own = frozenset(item for item in every if KINDS[kind].has(locale, item))
    return own if len(own) >= _MIN_ITEM_SHARE * len(every) else frozenset()


def sizes(kind: str, language: str) -> Mapping[str, int]:
    """Number of examples of each split."""
    own = items(kind, language)
    return {
        split: min(MAX_EXAMPLES[split], sum(count for item, count in counts.items() if item in own))
        for split, counts in _item_counts(kind).items()
    }


def generate(kind: str, language: str, split: str) -> list[specs.Example]:
    """The examples of `split`, in their fixed order.

    Raises:
      DataError: unknown kind, language or split, or a pair that Babel has no data for.
    """
    for field, value, known in (
        ("kind", kind, KINDS),
        ("language", language, LANGUAGES),
        ("split", split, MAX_EXAMPLES),
    ):
        if value not in known:
            raise DataError(f"{field}={value!r} of the CLDR tasks: use one of {list(known)}")
    own = items(kind, language)
    if not own:
        raise DataError(f"Babel has no {kind} data of its own for language {language!r}")
    return list(_generate(KINDS[kind], language, split, own))


def _generate(
    kind: Kind, language: str, split: str, own: frozenset[str]
) -> Iterator[specs.Example]:
    locale = Locale.parse(language)
    usable = (value for value in _values_by_split(kind.name)[split] if value.item in own)
    for value, _ in zip(usable, range(MAX_EXAMPLES[split]), strict=False):
        yield {
            "inputs": kind.template.format(value=value.text, language=LANGUAGES[language]),
            "targets": kind.write(locale, value),
        }


def task_name(kind: str, language: str) -> str:
    """The name of the task of a kind and a language, which may not exist."""
    return f"cldr_{kind}_{language}"


def _register() -> None:
    by_kind: dict[str, list[str]] = {}
    by_language: dict[str, list[str]] = {}
    for kind in KINDS:
        for language, language_name in LANGUAGES.items():
            if not items(kind, language):
                continue
            spec = specs.add_task(
                specs.TaskSpec(
                    name=task_name(kind, language),
                    description=f"CLDR {kind.replace('_', ' ')} in {language_name}",
                    source=functools.partial(generate, kind, language),
                    metrics=("exact_match", "chrf"),
                    sizes=sizes(kind, language),
                )
            )
            by_kind.setdefault(kind, []).append(spec.name)
            by_language.setdefault(language, []).append(spec.name)
    groups = {
        **{f"cldr_{kind}": (f"CLDR {kind}, all languages", t) for kind, t in by_kind.items()},
        **{
            f"cldr_{language}": (f"all CLDR tasks in {LANGUAGES[language]}", t)
            for language, t in by_language.items()
        },
        "cldr_all": ("all CLDR tasks", [name for names in by_kind.values() for name in names]),
    }
    for name, (description, names) in groups.items():
        specs.add_mixture(
            specs.MixtureSpec(
                name=name,
                description=description,
                tasks=tuple(names),
                rates=(1.0,) * len(names),
            )
        )


_register()

"""The generated localisation tasks."""

import hashlib
import re
import subprocess
import sys

import pytest
from babel import localedata

from sira_jax.errors import DataError
from tasks import cldr, specs
from tasks.cldr_kinds import KINDS, digest

# The languages the tasks were asked for by name; the others may change with Babel.
CORE = ("sw", "bn", "te", "am", "en")
ALL = [name for name in specs.TASKS if name.startswith("cldr_")]


def pair(name: str) -> tuple[str, str]:
    kind, language = name.removeprefix("cldr_").rsplit("_", 1)
    return kind, language


@pytest.mark.parametrize(
    ("name", "inputs", "targets"),
    [
        (
            "cldr_date_sw",
            "Write the date Fri 1970-05-22 in full in Swahili.",
            "Ijumaa, 22 Mei 1970",
        ),
        (
            "cldr_date_yo",
            "Write the date Fri 1970-05-22 in full in Yoruba.",
            "Ọjọ́ Ẹtì, 22 Oṣù Ẹ̀bibi 1970",
        ),
        ("cldr_unit_en", "Write the measure 2.5 day in full in English.", "2.5 days"),
        ("cldr_unit_sw", "Write the measure 2.5 day in full in Swahili.", "siku 2.5"),
        ("cldr_relative_en", "Write the relative time -6 hour in English.", "6 hours ago"),
        ("cldr_number_de", "Write the number 2584 in the format of German.", "2.584"),
        (
            "cldr_compact_hi",
            "Write the number 374082235080 in compact words in Hindi.",
            "3.7 खरब",
        ),
        ("cldr_currency_en", "Write the amount 839.80 PKR in the format of English.", "PKR839.80"),
        (
            "cldr_currency_name_en",
            "Write the amount 9.71 TRY with the currency's name in English.",
            "9.71 Turkish Lira",
        ),
    ],
)
def test_known_examples(name, inputs, targets):
    examples = specs.get_task(name).source("train")
    found = {example["inputs"]: example["targets"] for example in examples}
    assert found[inputs] == targets


def test_every_core_language_has_every_kind_but_those_babel_gets_wrong():
    missing = {
        (kind, language)
        for kind in KINDS
        for language in CORE
        if cldr.task_name(kind, language) not in specs.TASKS
    }
    # Babel 2.18 scales Swahili's compact numbers by a wrong power of ten.
    assert missing <= {("compact", "sw")}


@pytest.mark.parametrize("language", ["yo", "zu", "ig"])
def test_no_units_where_babel_has_none(language):
    assert cldr.task_name("unit", language) not in specs.TASKS
    with pytest.raises(DataError, match=f"no unit data of its own for language '{language}'"):
        cldr.generate("unit", language, "train")


@pytest.mark.parametrize("name", ALL)
def test_no_target_is_a_raw_key_or_the_root_locale_s(name):
    kind, language = pair(name)
    for example in specs.get_task(name).source("validation"):
        target = example["targets"]
        assert target.strip()
        assert not re.search(r"\b(length|mass|duration|volume|area|speed|power)-[a-z]", target)
        assert not re.search(r"\bM\d\d\b", target)
        if kind == "relative":
            assert not re.fullmatch(r"[+-]?\d+ (s|min|h|d|w|m|y)", target)
        if kind in ("date", "unit", "relative", "compact", "currency_name"):
            assert any(char.isalpha() for char in target)
        if language in ("bn", "te", "am", "hi", "ta", "mr", "ur", "ar", "ru") and kind in (
            "date",
            "unit",
            "relative",
            "compact",
        ):
            assert any(ord(char) > 0x370 for char in target)


def test_a_unit_missing_from_a_locale_is_left_out_of_its_task():
    without = [
        unit
        for unit, patterns in localedata.load("sw")["unit_patterns"].items()
        if unit in cldr._item_counts("unit")["train"]
        and not patterns.get("long")
        and patterns.get("short") == localedata.load("root")["unit_patterns"][unit]["short"]
    ]
    assert set(without).isdisjoint(cldr.items("unit", "sw"))
    assert "duration-day" in cldr.items("unit", "sw")


@pytest.mark.parametrize("kind", list(KINDS))
def test_values_are_disjoint_over_splits_and_languages(kind):
    texts = {split: set() for split in specs.SPLITS}
    for language, name in cldr.LANGUAGES.items():
        if cldr.task_name(kind, language) not in specs.TASKS:
            continue
        for split in specs.SPLITS:
            inputs = [example["inputs"] for example in cldr.generate(kind, language, split)]
            assert len(set(inputs)) == len(inputs)
            # The prompt without the language is the identity of the example.
            texts[split] |= {text.replace(name, "") for text in inputs}
    assert texts["train"].isdisjoint(texts["validation"])
    assert texts["train"].isdisjoint(texts["test"])
    assert texts["validation"].isdisjoint(texts["test"])


@pytest.mark.parametrize("name", ALL[::7])
def test_declared_sizes_are_true_and_full(name):
    spec = specs.get_task(name)
    assert {split: len(spec.source(split)) for split in spec.sizes} == dict(spec.sizes)
    assert dict(spec.sizes) == dict(cldr.MAX_EXAMPLES)


def test_all_declared_sizes_are_full():
    assert {tuple(specs.get_task(name).sizes.values()) for name in ALL} == {(2000, 100, 200)}


def test_generation_does_not_hang_on_the_process():
    """Neither on hash randomisation nor on what else used Babel before."""
    code = (
        "from babel import dates, Locale\n"
        "import datetime, hashlib\n"
        "dates.format_date(datetime.date(2020, 1, 1), 'full', locale='pt_PT')\n"
        "from tasks import cldr\n"
        "pairs = [(k, l) for k in ('date', 'relative') for l in ('sw', 'zu')]\n"
        "text = repr([cldr.generate(*pair, 'test') for pair in pairs])\n"
        "print(hashlib.sha256(text.encode()).hexdigest())"
    )
    pairs = [(kind, language) for kind in ("date", "relative") for language in ("sw", "zu")]
    text = repr([cldr.generate(*one, "test") for one in pairs])
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7", "PATH": ""},
    )
    assert result.stdout.strip() == hashlib.sha256(text.encode()).hexdigest()


def test_digest_is_fixed():
    # A changed digest would move examples between splits.
    assert digest("split", "date", "2031-07-09") == 505941316236373502


def test_mixtures_by_kind_and_by_language():
    assert set(specs.MIXTURES["cldr_date"].tasks) == {n for n in ALL if pair(n)[0] == "date"}
    assert set(specs.MIXTURES["cldr_sw"].tasks) == {n for n in ALL if pair(n)[1] == "sw"}
    assert set(specs.MIXTURES["cldr_all"].tasks) == set(ALL)
    assert len({pair(name)[1] for name in ALL}) >= 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dates", "sw", "train"), "kind='dates' of the CLDR tasks: use one of"),
        (("date", "xx", "train"), "language='xx' of the CLDR tasks: use one of"),
        (("date", "sw", "dev"), "split='dev' of the CLDR tasks: use one of"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(DataError, match=message):
        cldr.generate(*arguments)

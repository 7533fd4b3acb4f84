"""The kinds of text the CLDR tasks write: their values, what a language must have, and the target.

A value's `text` is the identity of an example: it stands in the prompt and decides the split. A
value's `item` (a unit, a currency, a magnitude) decides whether a language can write it: only items
for which Babel holds the language's own data count, so that no target is a raw key or the root
locale's abbreviation.

Decimal and currency formats are the exception. There CLDR leaves out what equals the root locale,
so that an inherited format is the language's correct one.
"""

import datetime
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from babel import Locale, dates, localedata, numbers, units

_UNIT_NAMES = """
angle-degree area-acre area-hectare area-square-centimeter
area-square-kilometer area-square-meter area-square-mile digital-bit digital-byte
digital-gigabyte digital-kilobyte digital-megabyte digital-terabyte duration-century
duration-day duration-hour duration-millisecond duration-minute duration-month duration-second
duration-week duration-year electric-ampere electric-ohm electric-volt energy-calorie
energy-joule energy-kilocalorie energy-kilojoule energy-kilowatt-hour frequency-hertz
frequency-kilohertz frequency-megahertz length-centimeter length-foot length-inch
length-kilometer length-light-year length-meter length-micrometer length-mile length-millimeter
length-nautical-mile length-yard mass-carat mass-gram mass-kilogram mass-microgram
mass-milligram mass-ounce mass-pound mass-ton mass-tonne power-horsepower power-kilowatt
power-megawatt power-watt pressure-hectopascal speed-kilometer-per-hour speed-knot
speed-meter-per-second speed-mile-per-hour temperature-celsius temperature-fahrenheit
volume-centiliter volume-cubic-kilometer volume-cubic-meter volume-cup volume-gallon
volume-hectoliter volume-liter volume-milliliter volume-tablespoon volume-teaspoon
"""
_UNITS = tuple(_UNIT_NAMES.split())
_UNIT_VALUES = (
    *map(Decimal, range(1, 41)),
    *map(Decimal, range(45, 101, 5)),
    *map(Decimal, (120, 150, 200, 250, 300, 400, 500, 750, 1000, 1500, 2500, 10000)),
    *(Decimal(n) + Decimal("0.5") for n in range(1, 21)),
    *map(Decimal, ("0.5", "0.25", "1.25", "2.75", "3.2", "4.8", "7.1", "12.75", "33.3", "66.6")),
)
_RELATIVE_SECONDS: Mapping[str, int] = dict(dates.TIMEDELTA_UNITS)
_WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_RELATIVE_COUNTS = tuple(range(1, 251))
_NUM_NUMBERS = 6000
_MAGNITUDES = range(4, 12)
_CURRENCY_NAMES = """
AED AUD BDT BRL CAD CHF CNY EGP ETB EUR GBP IDR INR JPY KES KRW MXN NGN NOK PHP PKR RUB SAR
SEK THB TRY TZS UGX USD VND ZAR
"""
_CURRENCIES = tuple(_CURRENCY_NAMES.split())


@dataclass(frozen=True)
class Value:
    """What one example writes.

    Attributes:
      text: the value as it stands in the prompt, and the identity that decides the split.
      item: what a language needs data for: a unit, a currency, a magnitude.
      number: the value itself (a date, or a Decimal, or a signed count).
    """

    text: str
    item: str
    number: Any


@dataclass(frozen=True)
class Kind:
    """A kind of text.

    Attributes:
      name: the middle part of the task names.
      template: the prompt, with the fields {value} and {language}.
      values: all values of the kind.
      has: whether Babel holds the language's own data for an item.
      write: the target, Babel's output unchanged.
    """

    name: str
    template: str
    values: Callable[[], Iterable[Value]]
    has: Callable[[Locale, str], bool]
    write: Callable[[Locale, Value], str]


def digest(*parts: object) -> int:
    """A 64-bit number from the text of `parts`, the same on every machine."""
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _decimals(name: str, low: int, high: int, places: int) -> Iterable[Decimal]:
    """Decimals with `low` to `high` digits before the point and at most `places` after it."""
    for i in range(_NUM_NUMBERS):
        digits = low + digest(name, "digits", i) % (high - low + 1)
        whole = 10 ** (digits - 1) + digest(name, "whole", i) % (9 * 10 ** (digits - 1))
        decimals = digest(name, "places", i) % (places + 1)
        fraction = digest(name, "fraction", i) % 10**decimals
        yield Decimal(whole) + Decimal(fraction).scaleb(-decimals)


def _always(locale: Locale, item: str) -> bool:
    del locale, item
    return True


def _data(locale: str, field: str) -> Mapping[str, Any]:
    """Babel's data of a locale, read and never written.

    Babel shares nested dictionaries between a locale and those that inherit from it, and replaces
    aliases in place when it resolves them. So this reads the plain data: opening Locale("root"), or
    localedata.load(..., merge_inherited=False), would change what later locales inherit.
    """
    return localedata.load(locale)[field]


def _date_values() -> Iterable[Value]:
    first, end = datetime.date(1950, 1, 1).toordinal(), datetime.date(2050, 1, 1).toordinal()
    for ordinal in range(first, end):
        date = datetime.date.fromordinal(ordinal)
        # With its weekday: to write a date is the task, to work out a calendar is another.
        yield Value(f"{_WEEKDAYS[date.weekday()]} {date.isoformat()}", "names", date)


def _has_names(locale: Locale, item: str) -> bool:
    del item
    return all(
        set(_data(str(locale), field)["format"]["wide"].values()).isdisjoint(
            _data("root", field)["format"]["wide"].values()
        )
        for field in ("months", "days")
    )


def _write_date(locale: Locale, value: Value) -> str:
    return dates.format_date(value.number, "full", locale=locale)


def _unit_values() -> Iterable[Value]:
    for unit in _UNITS:
        name = unit.split("-", 1)[1].replace("-", " ")
        for number in _UNIT_VALUES:
            yield Value(f"{number} {name}", unit, number)


@functools.cache
def _plural_forms(locale: Locale, values: tuple[Any, ...]) -> frozenset[str]:
    return frozenset(map(locale.plural_form, values))


@functools.cache
def _unit_length(locale: Locale, unit: str) -> str | None:
    """The pattern length that holds the unit's long form, None where the language lacks the unit.

    CLDR's root locale aliases a missing long pattern to the short one (UTS #35, part 2, Unit
    Elements); Babel does not follow the alias and would return the raw unit name. A short pattern
    counts where it is the language's own (Swahili "siku 3"), not where it is root's symbol.
    """
    patterns = _data(str(locale), "unit_patterns").get(unit, {})
    root = _data("root", "unit_patterns")[unit]["short"]
    forms = _plural_forms(locale, _UNIT_VALUES)
    for length in ("long", "short"):
        of_length = patterns.get(length, {})
        if forms <= set(of_length) and of_length.get("other") != root["other"]:
            return length
    return None


def _has_unit(locale: Locale, item: str) -> bool:
    return _unit_length(locale, item) is not None


def _write_unit(locale: Locale, value: Value) -> str:
    length = _unit_length(locale, value.item)
    return units.format_unit(value.number, value.item, length, locale=locale)


def _relative_values() -> Iterable[Value]:
    for unit in _RELATIVE_SECONDS:
        for count in _RELATIVE_COUNTS:
            for sign in (-1, 1):
                yield Value(f"{sign * count:+d} {unit}", unit, sign * count)


def _has_relative(locale: Locale, item: str) -> bool:
    own = _data(str(locale), "date_fields").get(item, {})
    root = _data("root", "date_fields")[item]
    forms = _plural_forms(locale, _RELATIVE_COUNTS)
    return all(
        forms <= set(own.get(tense, {})) and own[tense]["other"] != root[tense]["other"]
        for tense in ("past", "future")
    )


def _write_relative(locale: Locale, value: Value) -> str:
    # An endless threshold keeps Babel from changing to a larger unit ("+7 day" -> "in 1 week").
    return dates.format_timedelta(
        value.number * _RELATIVE_SECONDS[value.item],
        granularity=value.item,
        threshold=float("inf"),
        add_direction=True,
        locale=locale,
    )


def _number_values() -> Iterable[Value]:
    for number in _decimals("number", 4, 9, 3):
        yield Value(str(number), "decimal", number)


def _write_number(locale: Locale, value: Value) -> str:
    return numbers.format_decimal(value.number, locale=locale)


def _compact_values() -> Iterable[Value]:
    for magnitude in _MAGNITUDES:
        for leading in range(10, 1000):
            # Up to three significant digits, with the rest of the number below them.
            rest = digest("compact", magnitude, leading) % 10 ** (magnitude - 3)
            number = Decimal(leading if leading >= 100 else 10 * leading) * 10 ** (magnitude - 2)
            number = number + rest if leading >= 100 else number
            yield Value(str(number), f"1e{magnitude}", number)


def _has_compact(locale: Locale, item: str) -> bool:
    """Whether there is a pattern in words and Babel applies it rightly.

    Babel 2.18 counts the zeros of both subpatterns of "elfu 00;elfu -00" (Swahili) and so scales by
    the wrong power of ten; the number of digits it writes shows that.
    """
    if "long" not in locale.compact_decimal_formats:
        return False
    pattern = locale.compact_decimal_formats["long"]["other"][str(int(Decimal(item)))].pattern
    text = numbers.format_compact_decimal(Decimal(item), format_type="long", locale=locale)
    in_words = any(char.isalpha() for char in text)
    return in_words and sum(map(str.isdigit, text)) == pattern.split(";")[0].count("0")


def _write_compact(locale: Locale, value: Value) -> str:
    return numbers.format_compact_decimal(
        value.number, format_type="long", locale=locale, fraction_digits=1
    )


def _currency_values() -> Iterable[Value]:
    for i, amount in enumerate(_decimals("currency", 1, 6, 2)):
        currency = _CURRENCIES[digest("currency", i) % len(_CURRENCIES)]
        yield Value(f"{amount:.2f} {currency}", currency, amount)


def _write_currency(locale: Locale, value: Value) -> str:
    return numbers.format_currency(value.number, value.item, locale=locale)


def _has_currency_name(locale: Locale, item: str) -> bool:
    return item in locale.currencies


def _write_currency_name(locale: Locale, value: Value) -> str:
    return numbers.format_currency(value.number, value.item, locale=locale, format_type="name")


KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "date",
            "Write the date {value} in full in {language}.",
            _date_values,
            _has_names,
            _write_date,
        ),
        Kind(
            "unit",
            "Write the measure {value} in full in {language}.",
            _unit_values,
            _has_unit,
            _write_unit,
        ),
        Kind(
            "relative",
            "Write the relative time {value} in {language}.",
            _relative_values,
            _has_relative,
            _write_relative,
        ),
        Kind(
            "number",
            "Write the number {value} in the format of {language}.",
            _number_values,
            _always,
            _write_number,
        ),
        Kind(
            "compact",
            "Write the number {value} in compact words in {language}.",
            _compact_values,
            _has_compact,
            _write_compact,
        ),
        Kind(
            "currency",
            "Write the amount {value} in the format of {language}.",
            _currency_values,
            _always,
            _write_currency,
        ),
        Kind(
            "currency_name",
            "Write the amount {value} with the currency's name in {language}.",
            _currency_values,
            _has_currency_name,
            _write_currency_name,
        ),
    )
}

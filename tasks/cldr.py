"""Localisation tasks generated from the CLDR data inside the Babel package: no download.

A task is a kind of text and a language, for example `cldr_date_sw`: write a date in full in Swahili. Kind x language
gives a multitask, multilingual mixture of short sequences whose answers are unambiguous.

* Which pairs exist. A language has a kind where Babel holds the language's own data for at least half of the kind's
  items (units, currencies, magnitudes, ...); within a pair only those items are used. So no target is a raw key or the
  root locale's abbreviation. Decimal and currency formats are the exception: there CLDR leaves out what equals the root
  locale, so that inheriting it is the language's correct form.
* Units. CLDR's root locale aliases a missing long pattern to the short one (UTS #35 part 2, Unit Elements), which Babel
  does not follow; we do, where the short pattern is the language's own (Swahili day: 'siku 3').
* Splits. The split is a hash of what is written (the date; the value and its unit), never of the language, so that no
  value is trained on in one language and tested in another. The order within a split is a hash too: no random generator
  takes part and the data are the same on every machine with the same Babel release.
* Targets are Babel's output unchanged, no-break spaces and joiners included.
"""

import datetime
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from babel import Locale, dates, numbers, units

from sira_jax.errors import DataError

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

# At most so many examples a task; every pair of today's Babel reaches them (a test holds that).
SPLIT_SIZES: Mapping[str, int] = {"train": 2000, "validation": 100, "test": 200}

_UNITS = tuple(
    """
    acceleration-g-force angle-degree area-acre area-hectare area-square-centimeter area-square-kilometer
    area-square-meter area-square-mile digital-bit digital-byte digital-gigabyte digital-kilobyte digital-megabyte
    digital-terabyte duration-century duration-day duration-hour duration-millisecond duration-minute duration-month
    duration-second duration-week duration-year electric-ampere electric-ohm electric-volt energy-calorie energy-joule
    energy-kilocalorie energy-kilojoule energy-kilowatt-hour frequency-hertz frequency-kilohertz frequency-megahertz
    length-centimeter length-foot length-inch length-kilometer length-light-year length-meter length-micrometer
    length-mile length-millimeter length-nautical-mile length-yard light-lux mass-carat mass-gram mass-kilogram
    mass-microgram mass-milligram mass-ounce mass-pound mass-ton mass-tonne power-horsepower power-kilowatt
    power-megawatt power-watt pressure-hectopascal speed-kilometer-per-hour speed-knot speed-meter-per-second
    speed-mile-per-hour temperature-celsius temperature-fahrenheit volume-centiliter volume-cubic-kilometer
    volume-cubic-meter volume-cup volume-gallon volume-hectoliter volume-liter volume-milliliter volume-tablespoon
    volume-teaspoon
    """.split()
)
_UNIT_VALUES = tuple(
    Decimal(text)
    for text in [str(n) for n in range(1, 41)]
    + [str(n) for n in range(45, 101, 5)]
    + ["120", "150", "200", "250", "300", "400", "500", "750", "1000", "1500", "2500", "10000"]
    + [f"{n}.5" for n in range(1, 21)]
    + ["0.5", "0.25", "1.25", "2.75", "3.2", "4.8", "7.1", "12.75", "33.3", "66.6"]
)
_RELATIVE_SECONDS: Mapping[str, int] = dict((unit, size) for unit, size in dates.TIMEDELTA_UNITS)
_RELATIVE_COUNTS = range(1, 251)
_CURRENCIES = tuple(
    "AED AUD BDT BRL CAD CHF CNY EGP ETB EUR GBP IDR INR JPY KES KRW MXN NGN NOK PHP PKR RUB SAR SEK THB TRY TZS UGX "
    "USD VND ZAR".split()
)


@dataclass(frozen=True)
class Value:
    """What an example writes: `item` decides whether a language can (a unit, a currency), `text` stands in the prompt.

    `text` is the identity of the example: the split hangs on it alone.
    """

    item: str
    number: Any
    text: str


@dataclass(frozen=True)
class Kind:
    """A kind of text.

    Attributes:
      name: middle part of the task names.
      template: the prompt, with the fields {value} and {language}.
      values: all values of the kind, in any order.
      items: every item the values use.
      has: whether Babel holds the language's own data for an item.
      write: the target.
    """

    name: str
    template: str
    values: Callable[[], Iterable[Value]]
    items: Sequence[str]
    has: Callable[[Locale, str], bool]
    write: Callable[[Locale, Value], str]


def _digest(*parts: object) -> bytes:
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=16).digest()


def _draw(name: str, index: int, low: int, high: int) -> int:
    """A number of [low, high), the same on every machine."""
    return low + int.from_bytes(_digest("draw", name, index)[:8], "big") % (high - low)


def _always(locale: Locale, item: str) -> bool:
    del locale, item
    return True


# date ------------------------------------------------------------------------------------------------------------------


def _date_values() -> Iterable[Value]:
    first = datetime.date(1950, 1, 1).toordinal()
    last = datetime.date(2050, 1, 1).toordinal()
    for ordinal in range(first, last):
        date = datetime.date.fromordinal(ordinal)
        yield Value("full", date, date.isoformat())


def _has_date(locale: Locale, item: str) -> bool:
    del item
    root = Locale("und")
    months, days = locale.months["format"]["wide"], locale.days["format"]["wide"]
    return dict(months) != dict(root.months["format"]["wide"]) and dict(days) != dict(
        root.days["format"]["wide"]
    )


def _write_date(locale: Locale, value: Value) -> str:
    return dates.format_date(value.number, "full", locale=locale)


# unit ------------------------------------------------------------------------------------------------------------------


def _unit_values() -> Iterable[Value]:
    for unit in _UNITS:
        name = unit.split("-", 1)[1].replace("-", " ")
        for number in _UNIT_VALUES:
            yield Value(unit, number, f"{number} {name}")


@functools.lru_cache(maxsize=None)
def _unit_length(locale: Locale, unit: str) -> str | None:
    """'long', or 'short' where CLDR aliases the one to the other, or None where the language lacks the unit."""
    patterns = locale.unit_patterns_of(unit) if hasattr(locale, "unit_patterns_of") else None
    return patterns


def _write_unit(locale: Locale, value: Value) -> str:
    length = _unit_length(locale, value.item)
    return units.format_unit(value.number, value.item, length, locale=locale)

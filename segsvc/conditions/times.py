"""Moments as the runtime's ``timestamp()`` reads them, for literals. SQL reads attributes by the same rules.

The runtime parses with Abseil's ``ParseTime`` and the format RFC3339_full, which takes more than RFC 3339 writes:
blanks around the text, single digits, offsets without a colon or minutes, and a second 60, which is the first moment of
the next minute. It keeps quarters of a nanosecond.
"""

from __future__ import annotations

import re
from typing import Final

TICKS: Final = 4_000_000_000
"""Ticks of a second: quarters of a nanosecond."""
FIRST_S: Final = -62_135_596_800
"""0001-01-01T00:00:00Z in seconds since 1970."""
LAST_S: Final = 253_402_300_799
"""9999-12-31T23:59:59Z"""
FIRST: Final = FIRST_S * TICKS
LAST: Final = LAST_S * TICKS + 999_999_999 * 4
"""The first and the last moment, in ticks since 1970."""

# For Python and for PostgreSQL: no class that one of them reads in its own way. A year beyond 10000 is out of range
# whatever its offset.
PATTERN: Final = (
    r"^[ \t\n\v\f\r]*0*([0-9]{1,5})-([0-9]{1,2})-([0-9]{1,2})[Tt]([0-9]{1,2}):([0-9]{1,2}):([0-9]{1,2})"
    r"(?:[.]([0-9]+))?(?:[Zz]|([+-])([0-9]{2})(?::?([0-9]{2})(?::?([0-9]{2}))?)?)[ \t\n\v\f\r]*$"
)
FRACTION_DIGITS: Final = 15
"""Digits of a second's fraction that are read; the rest is ignored."""
_COMPILED: Final = re.compile(PATTERN.removesuffix("$") + r"\Z")
_DAYS: Final = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
DAYS_BEFORE_1970: Final = 719_468
"""Days from 0000-03-01 to 1970-01-01."""


def ticks_of(text: str) -> int | None:
    """The moment in ticks since 1970; None: the text is no time, or out of range."""
    found = _COMPILED.match(text)
    if found is None:
        return None

    year, month, day, hour, minute, second = (int(found[group]) for group in range(1, 7))
    offset = [int(found[group] or 0) for group in (9, 10, 11)]
    if not (1 <= month <= 12 and 1 <= day <= _days(year, month) and hour <= 23 and minute <= 59 and second <= 60):
        return None
    if offset[0] > 23 or offset[1] > 59 or offset[2] > 59:
        return None

    east = (offset[0] * 60 + offset[1]) * 60 + offset[2]
    seconds = ((days_since_1970(year, month, day) * 24 + hour) * 60 + minute) * 60 + second
    seconds += east if found[8] == "-" else -east

    fraction = (found[7] or "")[:FRACTION_DIGITS].ljust(FRACTION_DIGITS, "0")
    below = 0 if second == 60 else int(fraction) * TICKS // 10**FRACTION_DIGITS
    ticks = seconds * TICKS + below
    return ticks if FIRST <= ticks <= LAST else None


def days_since_1970(year: int, month: int, day: int) -> int:
    """Of the Gregorian calendar, also before it was introduced; year 0 or later.

    Years begin with March here, so that the leap day is a year's last one. Source: H. Hinnant, "chrono-Compatible
    Low-Level Date Algorithms", days_from_civil.
    """
    # 400 years more, which are 146097 days, so that no division has a negative number.
    years = year + 400 - (month <= 2)
    day_of_year = (153 * ((month + 9) % 12) + 2) // 5 + day - 1
    return years * 365 + years // 4 - years // 100 + years // 400 + day_of_year - 146_097 - DAYS_BEFORE_1970


def _days(year: int, month: int) -> int:
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    return 29 if month == 2 and leap else _DAYS[month - 1]

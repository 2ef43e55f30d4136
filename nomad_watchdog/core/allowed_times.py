"""Weekly times in which something is allowed, such as "Mon-Fri 09:00-16:00 Europe/Berlin". Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Final
from zoneinfo import ZoneInfo

from nomad_watchdog.model import WallTime

DAYS: Final = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_TEXT: Final = re.compile(
    r"(?:(?P<days>[A-Za-z,-]{3,31}) )?(?P<begins>\d\d:\d\d)-(?P<ends>\d\d:\d\d)(?: (?P<zone>[A-Za-z0-9_+/-]{1,40}))?"
)
_DAY_MINUTES: Final = 24 * 60
_FORM: Final = (
    'write it as "Mon-Fri 09:00-16:00 Europe/Berlin"; days and time zone (UTC) may be left out'
)


@dataclass(frozen=True, slots=True)
class WeeklyTime:
    """One weekly time. It may go beyond midnight, and belongs to the day on which it begins."""

    text: str
    days: frozenset[int]
    """0 = Monday to 6."""
    begins: int
    """Minutes after midnight, local time."""
    lasts: int
    """Minutes, 1 to 1440."""
    zone: tzinfo

    def holds(self, now: WallTime) -> bool:
        """Whether it is that time now."""
        local = datetime.fromtimestamp(now, self.zone)
        minute = local.hour * 60 + local.minute
        today, yesterday = local.weekday(), (local.weekday() - 1) % 7
        return (today in self.days and self.begins <= minute < self.begins + self.lasts) or (
            yesterday in self.days and minute < self.begins + self.lasts - _DAY_MINUTES
        )


def parse(text: str) -> WeeklyTime:
    """Raises ValueError, in words, for anything else."""
    found = _TEXT.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is not a weekly time: {_FORM}")
    begins, ends = _minutes(found["begins"], 23), _minutes(found["ends"], 24)
    if begins == ends:
        raise ValueError(f"{text!r} has no duration; leave it out to allow every time")
    lasts = (ends - begins) % _DAY_MINUTES or _DAY_MINUTES
    return WeeklyTime(text, _days(found["days"] or "Mon-Sun"), begins, lasts, _zone(found["zone"]))


def allowed(times: Sequence[WeeklyTime], now: WallTime) -> bool:
    """Whether one of these times is now. No times: always."""
    return not times or any(one.holds(now) for one in times)


def _minutes(text: str, most_hours: int) -> int:
    hours, minutes = int(text[:2]), int(text[3:])
    if minutes > 59 or hours > most_hours or hours * 60 + minutes > _DAY_MINUTES:  # of a clock
        raise ValueError(f"{text} is not a time of day")
    return hours * 60 + minutes


def _days(text: str) -> frozenset[int]:
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        begin, end = _day(first), _day(last if dash else first)
        found |= {day % 7 for day in range(begin, end + 1 if end >= begin else end + 8)}
    return frozenset(found)


def _day(text: str) -> int:
    try:
        return DAYS.index(text.capitalize())
    except ValueError:
        raise ValueError(f"{text!r} is not a day of the week: {', '.join(DAYS)}") from None


def _zone(name: str | None) -> tzinfo:
    if name is None or name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (OSError, ValueError, KeyError):
        raise ValueError(
            f"time zone {name!r} is not known here (its name must be in the IANA database, such as Europe/Berlin)"
        ) from None


def begins_next(times: Iterable[WeeklyTime], now: WallTime) -> WallTime | None:
    """When the next of these times begins, to the minute; None = there is none within a week, or no time is given."""
    found: list[float] = []
    for one in times:
        local = datetime.fromtimestamp(now, one.zone)
        for ahead in range(8):
            day = (local + timedelta(days=ahead)).replace(
                hour=one.begins // 60, minute=one.begins % 60, second=0, microsecond=0
            )
            if day.weekday() in one.days and day.timestamp() > now:
                found.append(day.timestamp())
                break
    return WallTime(min(found)) if found else None

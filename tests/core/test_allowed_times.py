"""Weekly times: what is read, and when they hold."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomad_watchdog.core.allowed_times import DAYS, allowed, begins_next, parse
from nomad_watchdog.model import WallTime

BERLIN = ZoneInfo("Europe/Berlin")


def wall(*when: int, zone: ZoneInfo | None = None) -> WallTime:
    return WallTime(datetime(*when, tzinfo=zone or UTC).timestamp())  # type: ignore[misc,arg-type]


@pytest.mark.parametrize(
    ("text", "now", "holds"),
    [
        ("Mon-Fri 09:00-16:00 Europe/Berlin", wall(2026, 11, 30, 9, 0, zone=BERLIN), True),
        ("Mon-Fri 09:00-16:00 Europe/Berlin", wall(2026, 11, 30, 8, 59, zone=BERLIN), False),
        ("Mon-Fri 09:00-16:00 Europe/Berlin", wall(2026, 11, 30, 16, 0, zone=BERLIN), False),
        ("Mon-Fri 09:00-16:00 Europe/Berlin", wall(2026, 11, 29, 12, 0, zone=BERLIN), False),
        # in summer the same local time is an hour earlier in UTC
        ("Mon-Fri 09:00-16:00 Europe/Berlin", wall(2026, 7, 6, 7, 30), True),
        ("22:00-04:00", wall(2026, 11, 30, 3, 59), True),
        ("22:00-04:00", wall(2026, 11, 30, 4, 0), False),
        ("Sun 22:00-04:00", wall(2026, 11, 30, 3, 0), True),  # it began on Sunday
        ("Mon 22:00-04:00", wall(2026, 11, 30, 3, 0), False),
        ("Sat-Mon 00:00-24:00", wall(2026, 11, 29, 23, 59), True),
        ("Sat,Mon 00:00-24:00", wall(2026, 11, 29, 23, 59), False),
    ],
)
def test_when_a_time_holds(text: str, now: WallTime, holds: bool) -> None:
    """At its borders, beyond midnight, on other days, and in summer; without any time, everything is allowed."""
    assert allowed([parse(text)], now) is holds
    assert allowed([], now)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Mon-Fri",
        "9-16",
        "Mon 09:00-09:00",
        "Mon 25:00-26:00",
        "Mon 09:60-10:00",
        "Mon 09:00-24:01",
        "Mo 09:00-16:00",
        "Mon-Fri 09:00-16:00 Mars/Olympus",
        "Mon-Fri 09:00-16:00 ../../etc/passwd",
        "Mon  09:00-16:00",
    ],
)
def test_what_is_no_weekly_time(text: str) -> None:
    """Each is refused with a message that quotes what is wrong."""
    with pytest.raises(ValueError, match=r"time|day"):
        parse(text)


@given(
    st.sampled_from(DAYS),
    st.integers(0, 23),
    st.integers(1, 24),
    st.sampled_from(["", " UTC", " Europe/Berlin", " America/Sao_Paulo"]),
    st.integers(0, 7 * 24 * 60),
)
def test_the_next_beginning_is_allowed_and_no_moment_before_it(
    day: str, begins: int, lasts: int, zone: str, minute: int
) -> None:
    """Outside of a time, the time that `begins_next` returns is the first minute that is allowed."""
    ends = (begins + lasts) % 24
    if begins == ends:
        ends = begins + 1
    one = parse(f"{day} {begins:02}:00-{ends:02}:00{zone}")
    now = WallTime((datetime(2026, 11, 30, tzinfo=UTC) + timedelta(minutes=minute)).timestamp())
    opens = begins_next([one], now)
    assert opens is not None
    assert allowed([one], opens)
    if not allowed([one], now):
        before = [WallTime(opens - 60 * n) for n in range(1, 120) if opens - 60 * n >= now]
        assert not any(allowed([one], at) for at in before)

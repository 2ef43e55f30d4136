"""Durations, sizes, ages and times: read from text, and shown as text."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

_DURATION: Final = re.compile(r"(?:\d{1,9}(?:\.\d{1,6})?(?:ms|s|m|h|d))+", re.ASCII)
_PART: Final = re.compile(r"([\d.]+)(ms|s|m|h|d)", re.ASCII)
_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE: Final = re.compile(r"(\d{1,12})(B|Ki|Mi|Gi|k|M|G)B?", re.ASCII)
_BYTES: Final = {
    "B": 1,
    "Ki": 1024,
    "Mi": 1024**2,
    "Gi": 1024**3,
    "k": 1000,
    "M": 1000**2,
    "G": 1000**3,
}
_MAX_SHOWN: Final = 80
_MAX_BITS: Final = 256


def parse_duration(value: object) -> float:
    """Seconds of "250ms", "10s", "1m30s", "2h" or "1d". A float is taken as seconds already
    converted. Raises ValueError with what was found and what is allowed."""
    if isinstance(value, float):
        return value
    if not isinstance(value, str) or not _DURATION.fullmatch(value):
        raise ValueError(f'{show(value)} is not a duration; write "250ms", "10s", "5m" or "1h"')
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in _PART.findall(value))
    if seconds > 365 * 86400:
        raise ValueError(f"{show(value)} is more than a year")
    return round(seconds, 6)


def parse_size(value: object) -> int:
    """Bytes of "64Mi", "1Gi", "512Ki" or "100k". Raises ValueError as `parse_duration`."""
    found = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise ValueError(f'{show(value)} is not a size; write "64Mi", "1Gi" or "512Ki"')
    return int(found[1]) * _BYTES[found[2]]


def show(value: object) -> str:
    """A value as it may stand in a message: as HCL writes it, short, ASCII, no control characters (S11)."""
    text = _as_hcl(value)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


def _as_hcl(value: object) -> str:
    if isinstance(value, str):
        return '"' + ascii(value)[1:-1] + '"'
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        return "a number of very many digits"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_as_hcl, value[:_MAX_SHOWN]))}]"
    if isinstance(value, Mapping):
        pairs = (f"{str(name)[:_MAX_SHOWN]!a} = {_as_hcl(one)}" for name, one in value.items())
        return "{ " + ", ".join(pair.replace("'", "", 2) for pair in pairs) + " }"
    return ascii(value)


def age(seconds: object) -> str:
    """``42s``, ``3m``, ``5h`` or ``2d``: one unit is enough in a column."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or math.isnan(seconds):
        return ""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"


def span(text: object) -> str:
    """A duration of the API in the largest unit that holds it exactly: ``300s`` as ``5m``; "" for none."""
    if not isinstance(text, str):
        return ""
    try:
        seconds = parse_duration(text)
    except ValueError:
        return text
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds and seconds % size == 0:
            return f"{seconds / size:.0f}{unit}"
    return text


def utc(seconds: object) -> str:
    """Unix seconds as ``2026-11-29T19:48:08Z``; "" for what is no moment of the years 1 to 9999."""
    moment = _moment(seconds)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ") if moment else ""


def local(seconds: object) -> str:
    """Unix seconds as ``2026-11-29 20:48:08`` in the time zone of this machine or of TZ; "" as `utc`."""
    moment = _moment(seconds)
    try:
        return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S") if moment else ""
    except (
        ValueError,
        OverflowError,
        OSError,
    ):  # beyond year 9999 there, or unknown to the C library
        return ""


def _moment(seconds: object) -> datetime | None:
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        return None
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        return None


def progress(done: int, under_way: int, waiting: int) -> str:
    """How far a roll-out is, in words: numbers of devices."""
    return f"{done} done, {under_way} in progress, {waiting} waiting for their turn"

"""Numbers and JSON from outside, bounded where they are parsed. Both programs use these.

Python refuses to convert more than 4,300 digits with an error of its own, takes digits of every script,
and makes infinity of `1e999`.
"""

from __future__ import annotations

from watchdog_agent.runtime.stdlib_light import json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_DIGITS = 20
"""As many as 64 bits have."""
MAX_CHARS = 400
"""Longest text of a number with a point or an exponent."""
MAX_NESTING = 64
"""Lists and objects within each other."""
_NUMBER = frozenset("0123456789+-.eE")


def whole(text: str, low: int = 0, high: int = 2**63 - 1) -> int:
    """The whole number from `low` to `high` that is written here in ASCII digits. Raises ValueError."""
    if 0 < len(text) <= MAX_DIGITS and text.isascii() and text.isdigit():
        number = int(text)
        if low <= number <= high:
            return number
    raise ValueError(f"{_shown(text)} is not a whole number from {low} to {high}")


def finite(text: str) -> float:
    """The number that is written here, never infinity. Raises ValueError."""
    if 0 < len(text) <= MAX_CHARS and _NUMBER.issuperset(text):
        try:
            number = float(text)
        except ValueError:
            number = float("inf")
        if number - number == 0:
            return number
    raise ValueError(f"{_shown(text)} is not a number, or out of range")


def number_or(value: object, default: float) -> float:
    """A finite number from a document that others wrote, else the default."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return default
    return float(value) if -1e15 < value < 1e15 else default


def loads(text: str | bytes | bytearray) -> Any:
    """The one value of a JSON text, as `bounded` allows it. Raises ValueError."""
    try:
        return bounded(json.loads(text))
    except RecursionError:
        raise ValueError("lists and objects are nested too deeply") from None
    except ValueError as error:
        if str(error).startswith("Exceeds"):  # Python's limit of digits, in Python's words
            raise ValueError("a number has too many digits") from None
        raise


def bounded(value: Any) -> Any:
    """The value of a JSON text. Raises ValueError when it holds a number of more than 64 bits, an infinite one,
    or more than 64 lists and objects within each other."""
    level = [value]
    for _ in range(MAX_NESTING + 1):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner += one.values()
            elif isinstance(one, list):
                inner += one
            elif isinstance(one, float):
                if one - one != 0:
                    raise ValueError("a number is out of range")
            elif isinstance(one, int) and not -(2**63) <= one < 2**64:
                raise ValueError("a number has too many digits")
        if not inner:
            return value
        level = inner
    raise ValueError("lists and objects are nested too deeply")


def _shown(text: str) -> str:
    return ascii(text) if len(text) <= 40 else f"{text[:40]!a}…"

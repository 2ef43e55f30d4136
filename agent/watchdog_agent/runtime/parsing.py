"""Parses external numbers and JSON with limits. Used by the agent and the control plane.

Python rejects more than 4,300 digits with its own error message, accepts digits of every script,
and converts `1e999` to infinity.
"""

from __future__ import annotations

from watchdog_agent.runtime.stdlib_light import json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_DIGITS = 20
"""Maximum number of digits of a 64-bit number."""
MAX_CHARS = 400
"""Maximum length of a number with a decimal point or an exponent."""
MAX_NESTING = 64
"""Maximum nesting depth of lists and objects."""
_NUMBER = frozenset("0123456789+-.eE")


def whole(text: str, low: int = 0, high: int = 2**63 - 1) -> int:
    """Parse a whole number from `low` to `high` in ASCII digits. Raises ValueError."""
    if 0 < len(text) <= MAX_DIGITS and text.isascii() and text.isdigit():
        number = int(text)
        if low <= number <= high:
            return number
    raise ValueError(f"{_shown(text)} is not a whole number from {low} to {high}")


def finite(text: str) -> float:
    """Parse a finite number. Raises ValueError."""
    if 0 < len(text) <= MAX_CHARS and _NUMBER.issuperset(text):
        try:
            number = float(text)
        except ValueError:
            number = float("inf")
        if number - number == 0:
            return number
    raise ValueError(f"{_shown(text)} is not a number, or out of range")


def whole_or(text: str, default: int) -> int:
    """Parse a whole number of at most 63 bits; the default if the text is none."""
    try:
        return whole(text)
    except ValueError:
        return default


def number_or(value: object, default: float) -> float:
    """The value if it is a finite number, else the default; for external documents."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return default
    return float(value) if -1e15 < value < 1e15 else default


def loads(text: str | bytes | bytearray) -> Any:
    """Parse a JSON text within the limits of `bounded`. Raises ValueError."""
    try:
        return bounded(json.loads(text))
    except RecursionError:
        raise ValueError("lists and objects are nested too deeply") from None
    except ValueError as error:
        if str(error).startswith("Exceeds"):  # Python's limit of digits, with its own message
            raise ValueError("a number has too many digits") from None
        raise


def bounded(value: Any) -> Any:
    """Return a parsed JSON value. Raises ValueError for a number of more than 64 bits, an infinite one,
    or lists and objects nested more than 64 deep."""
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

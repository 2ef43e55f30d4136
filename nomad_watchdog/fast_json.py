"""JSON as short and as fast as it gets, for what is written many times a second; and read as strictly as it gets."""

from __future__ import annotations

import json
from typing import Any, NoReturn

import orjson
from watchdog_agent.runtime.parsing import bounded


def as_json(told: Any) -> bytes:
    """`told` as UTF-8 without spaces. A number that is not finite becomes null.

    Raises TypeError for what is no JSON, ValueError for text that is no Unicode, and for a number that is not
    finite beside what only the standard library can write."""
    try:
        return orjson.dumps(told)
    except TypeError:
        # what the standard library can: an integer of more than 64 bits, a key that is no text
        text = json.dumps(told, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode()


def strict(text: str) -> Any:
    """The one value of a JSON text, as `digits.bounded` allows it, in which no name occurs twice in one object.
    Raises ValueError, in the parser's words or ours."""
    try:
        return bounded(
            json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)  # noqa: TID251
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        if str(error).startswith("Exceeds"):  # Python's limit of digits, in Python's words
            raise ValueError("a number has too many digits") from None
        raise


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not allowed")

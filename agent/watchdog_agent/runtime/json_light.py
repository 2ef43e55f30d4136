"""`dumps` and `loads` from the C parts of the json module. Raises ImportError if they differ from CPython's.

Input and output are those of the json module, except for UTF-16 text and the position of an error.
"""

from __future__ import annotations

import _json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_BLANKS = " \t\n\r"
_CONSTANTS = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


class _Rules:
    """The settings that the scanner requires."""

    strict = True
    object_hook = object_pairs_hook = None
    parse_float, parse_int, parse_constant = float, int, _CONSTANTS.__getitem__


_rules: Any = _Rules
_scan: Any = _json.make_scanner(_rules)


def _refuse(value: object) -> Any:
    raise TypeError(f"{type(value).__name__} is not JSON")


def dumps(
    value: Any, *, sort_keys: bool = False, default: Callable[[Any], Any] = _refuse
) -> str:  # as json.dumps has it
    """Encode a value as ASCII JSON. Raises TypeError, ValueError or RecursionError."""
    encode: Any = _json.make_encoder(
        {}, default, _json.encode_basestring_ascii, None, ": ", ", ", sort_keys, False, True
    )
    return "".join(encode(value, 0))


def loads(text: str | bytes | bytearray) -> Any:
    """Parse a text with one JSON value. Raises ValueError or RecursionError."""
    if not isinstance(text, str):
        text = bytes(text).removeprefix(b"\xef\xbb\xbf").decode()
    try:
        value, end = _scan(text, len(text) - len(text.lstrip(_BLANKS)))
    except (StopIteration, SystemError):
        # Up to Python 3.11 the scanner looks up its error class among the imported modules. Without
        # `json.decoder` it fails without an exception, so the call raises SystemError.
        raise ValueError("it is no JSON") from None
    if text[end:].strip(_BLANKS):
        raise ValueError("there is more after the JSON")
    return value


_SAMPLE = {"a": [1, 2.5, None, True, "\n\u00e9"], "b": {}}
try:
    if loads(dumps(_SAMPLE).encode()) != _SAMPLE:
        raise ImportError("_json is another than we know")
except TypeError:
    raise ImportError("_json is another than we know") from None

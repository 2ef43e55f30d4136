"""`dumps` and `loads` of the C parts of the module json. Raises ImportError where they are not as in CPython.

What it takes and says is the module's, but for text in UTF-16 and for the place of a mistake.
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
    """What the scanner asks for."""

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
    """The value as JSON, in ASCII. Raises TypeError, ValueError or RecursionError."""
    encode: Any = _json.make_encoder(
        {}, default, _json.encode_basestring_ascii, None, ": ", ", ", sort_keys, False, True
    )
    return "".join(encode(value, 0))


def loads(text: str | bytes | bytearray) -> Any:
    """The one value of a text. Raises ValueError or RecursionError."""
    if not isinstance(text, str):
        text = bytes(text).removeprefix(b"\xef\xbb\xbf").decode()
    try:
        value, end = _scan(text, len(text) - len(text.lstrip(_BLANKS)))
    except (StopIteration, SystemError):
        # Up to Python 3.11 the scanner looks for its error's class among the imported modules, and where
        # `json.decoder` is not there it fails without an exception: the call is a SystemError.
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

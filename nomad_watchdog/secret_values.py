"""The secrets that this process knows, so that no text that leaves it can hold one (S10).

Every module that reads a token, key or password calls `know`. Logs, errors, events and answers pass through
`hide`, which replaces these values wherever they stand, whatever is written around them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextvars import ContextVar
from functools import lru_cache
from typing import Final
from urllib.parse import quote, unquote, urlsplit

REDACTED: Final = "[redacted]"
SHORTEST: Final = 6
"""A shorter value is not hidden: it would be found inside ordinary words."""
MOST: Final = 256
"""Values that rotate and are kept; the one that was read longest ago is forgotten first."""
MIN_HEAD: Final = 16
"""A part of a value that is shorter may be an ordinary word."""
DEEPEST: Final = 32

_known: dict[str, None] = {}
"""Read once, and used as long as the process runs."""
_rotating: dict[str, None] = {}
"""The one that was read last is the last."""
_by_length: tuple[tuple[str, str], ...] = ()
"""Each value with the part of it that must not be shown either, longest first."""
_presented: ContextVar[str] = ContextVar("presented", default="")


def know(*secrets: str | bytes, rotates: bool = False) -> None:
    """Hide these values from now on, also where JSON or a URL has them escaped. `rotates`: others will take their
    place; call this again and again while they are used."""
    global _by_length  # noqa: PLW0603  # one process, one set of secrets
    values = {form for secret in secrets for form in _forms(secret)}
    fresh = not values <= _known.keys() | _rotating.keys()
    kept = _rotating if rotates else _known
    for value in values:
        kept.pop(value, None)
        kept[value] = None
    if fresh:
        for oldest in list(_rotating)[: max(0, len(_rotating) - MOST)]:
            del _rotating[oldest]
        _by_length = _with_heads(_known.keys() | _rotating.keys())


def forget() -> None:
    """Hide nothing any more; for tests, which share a process."""
    global _by_length  # noqa: PLW0603  # as above
    _known.clear()
    _rotating.clear()
    _own.cache_clear()
    _by_length = ()


def know_url(url: str) -> None:
    """Hide the password of this URL, if it has one."""
    try:
        password = urlsplit(url).password
    except ValueError:
        return
    if password:
        know(password, unquote(password))


def present(secret: str) -> None:
    """Hide what this caller sent as its token, in whatever is written while its request is handled."""
    _presented.set(secret)


def longest() -> int:
    """Characters of the longest value."""
    return len(_by_length[0][0]) if _by_length else 0


def hide(text: str) -> str:
    """The text without any known value. A value that was cut off is hidden too, if at least half of it is left."""
    presented = _presented.get()
    own = _own(presented) if presented else ()
    found = [pair for pair in (*own, *_by_length) if pair[1] in text]
    for value, _ in found:
        text = text.replace(value, REDACTED)
    for value, head in found:
        if head in text:
            text = _without_start(text, value, head)
    return text


@lru_cache(maxsize=256)
def _own(presented: str) -> tuple[tuple[str, str], ...]:
    return _with_heads(_forms(presented))


def hide_in(value: object, depth: int = 0) -> object:
    """`hide` for every text in parsed JSON. What is nested more than DEEPEST levels deep is left as it is."""
    if isinstance(value, str):
        return hide(value)
    if depth == DEEPEST:
        return value
    if isinstance(value, Mapping):
        return {key: hide_in(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [hide_in(item, depth + 1) for item in value]
    return value


def _forms(secret: str | bytes) -> set[str]:
    text = secret.decode("utf-8", "replace") if isinstance(secret, bytes) else secret
    text = text.strip()
    if len(text) < SHORTEST:
        return set()
    return {
        text,
        json.dumps(text)[1:-1],
        repr(text)[1:-1],
        quote(text, errors="replace"),
        quote(text, "", errors="replace"),
    }


def _with_heads(values: set[str]) -> tuple[tuple[str, str], ...]:
    ordered = sorted(values, key=len, reverse=True)
    return tuple((value, value[: max(MIN_HEAD, (len(value) + 1) // 2)]) for value in ordered)


def _without_start(text: str, value: str, head: str) -> str:
    parts: list[str] = []
    done, at = 0, text.find(head)
    while at >= 0:
        end = at + len(head)
        while end < len(text) and end - at < len(value) and text[end] == value[end - at]:
            end += 1
        parts += text[done:at], REDACTED
        done, at = end, text.find(head, end)
    return "".join(parts) + text[done:]

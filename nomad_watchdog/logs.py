"""Logs: one JSON object per line, or text for a terminal; never a secret, never a raw control character.

Every secret that this process has read is replaced wherever it stands (`secret_values`). Patterns hide what
looks like a secret of somebody else besides.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import logging
import logging.handlers
import queue
import re
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final, Literal, TextIO

from nomad_watchdog.secret_values import REDACTED, hide, longest

log = logging.getLogger(__name__)

Format = Literal["json", "text"]

LONGEST: Final = 2_000
"""Characters of one value; the rest is cut and its length told."""
LONGEST_TRACE: Final = 8_000
MAX_ITEMS: Final = 50
"""Items of one list or mapping."""
DEEPEST: Final = 4
QUEUE: Final = 10_000
"""Lines that may wait for a slow output; later ones are dropped."""

REPEAT_S: Final = 10.0
"""Trouble of one kind in the event loop is told at most so often."""
LASTING_S: Final = 600.0
"""A problem that goes on is logged again after so long."""
MAX_KINDS: Final = 100
codecs.lookup("unicode_escape")
# Loaded now: a process that has run out of file descriptors must still be able to say so.

_OWN: Final = frozenset(vars(logging.makeLogRecord({}))) | {
    "message",
    "asctime",
    "taskName",
    "cleaned",
}
_KEYS: Final = frozenset({"ts", "level", "logger", "msg", "exc"})
_SECRET_KEY: Final = re.compile(
    r"token|secret|authorization|password|passwd|credential|api[-_]?key|private[-_]?key|cookie",
    re.IGNORECASE,
)
_SECRET_VALUE: Final = re.compile(
    r"(\b(?:bearer|basic)\s+)[\w.~+/=-]{6,}"
    r"|((?:token|secret|password|authorization|api[-_]?key)[\"']?\s*[=:]\s*[\"']?)[^\s\"'&,;]+"
    r"|(://[^/\s:@]*:)[^/\s@]+(?=@)",
    re.IGNORECASE,
)


class Lasting:
    """A problem that may last: logged when it begins, every LASTING_S while it goes on, and when it is over."""

    def __init__(self, logger: logging.Logger, what: str) -> None:
        self._logger = logger
        self._what = what
        self._over = f"over: {what}"
        self._since: float | None = None
        self._logged_at = 0.0

    def goes_on(self, now: float, reason: str) -> None:
        """It was seen again. `now`: seconds of a monotonic clock."""
        if self._since is None:
            self._since = now
        elif now - self._logged_at < LASTING_S:
            return
        self._logged_at = now
        self._logger.warning(
            self._what, extra={"reason": reason, "lasted_s": round(now - self._since, 1)}
        )

    def over(self, now: float) -> float:
        """It was not seen any more; how long it had lasted, seconds, 0 = there was none."""
        if self._since is None:
            return 0.0
        lasted_s, self._since = round(now - self._since, 1), None
        self._logger.warning(self._over, extra={"lasted_s": lasted_s})
        return lasted_s


def clean(value: object, depth: int = 0) -> object:
    """The value as JSON can hold it: bounded, printable, without secrets."""
    if value is None or isinstance(value, bool | int | float):
        return value if not isinstance(value, float) or value - value == 0 else str(value)
    if isinstance(value, str):
        return clean_text(value)
    if depth < DEEPEST and isinstance(value, Mapping):
        return {
            clean_text(str(key)): REDACTED
            if _SECRET_KEY.search(str(key))
            else clean(item, depth + 1)
            for key, item in list(value.items())[:MAX_ITEMS]
        }
    if depth < DEEPEST and isinstance(value, list | tuple | set | frozenset):
        return [clean(item, depth + 1) for item in list(value)[:MAX_ITEMS]]
    return clean_text(str(value))


def clean_text(text: str, most: int = LONGEST) -> str:
    """Without secrets, cut, and with every unprintable character escaped."""
    # Cut first with a margin, so that a huge value is not searched as a whole. What may be the beginning of
    # a secret at the end of the margin goes: where others were hidden before it, it would move forward.
    margin, edge = most * 2, longest()
    cut = hide(text[: margin + edge])
    if len(text) > margin + edge:
        cut = cut[: len(cut) - edge]
    cut = _SECRET_VALUE.sub(lambda m: (m[1] or m[2] or m[3]) + REDACTED, cut)
    more = len(text) - most
    if more > 0:
        cut = f"{cut[:most]}… ({more} more characters)"
    if cut.isprintable():
        return cut
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


def _facts(record: logging.LogRecord) -> dict[str, object]:
    facts: dict[str, object] = {}
    for key, value in vars(record).items():
        if key not in _OWN and key not in _KEYS:
            shown = value if hasattr(record, "cleaned") else clean(value)
            facts[clean_text(key)] = REDACTED if _SECRET_KEY.search(key) else shown
    if record.exc_info and not record.exc_text:
        record.exc_text = logging.Formatter().formatException(record.exc_info)
    if record.exc_text:
        facts["exc"] = clean_text(record.exc_text, LONGEST_TRACE)
    return facts


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class JsonFormatter(logging.Formatter):
    """Keys ts (RFC 3339, UTC), level, logger, msg, then the extras in the order they were given."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "ts": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": clean_text(record.getMessage()),
            **_facts(record),
        }
        return json.dumps(line, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """For a terminal: time, level, message, key=value."""

    def format(self, record: logging.LogRecord) -> str:
        facts = "".join(
            f" {key}={value if isinstance(value, str) and _is_plain(value) else json.dumps(value, ensure_ascii=False)}"
            for key, value in _facts(record).items()
        )
        message = clean_text(record.getMessage())
        return f"{_time(record)} {record.levelname.lower():<8} {message}{facts}"


def _is_plain(text: str) -> bool:
    return bool(text) and not any(c in ' "=\\' for c in text)


class _Queue(logging.handlers.QueueHandler):
    """Hands records to the listener's thread; a full queue drops and counts, it never blocks."""

    def __init__(self, waiting: queue.Queue[logging.LogRecord]) -> None:
        super().__init__(waiting)
        self.dropped = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        # Rendered here, in the caller's thread: an argument may change before the listener looks, and only here
        # is it known what the caller presented as its token.
        if record.exc_info and not record.exc_text:
            record.exc_text = hide(logging.Formatter().formatException(record.exc_info))
        record.msg, record.args, record.exc_info = hide(record.getMessage()), None, None
        for key, value in list(vars(record).items()):
            if key not in _OWN:
                setattr(record, key, clean(value))
        record.cleaned = True  # cutting a text again would count what was cut wrong
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1


class LoopTrouble:
    """Exception handler of an event loop. One that has run out of file descriptors reports every accept
    that failed, hundreds a second and each with its trace (S9)."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[float, int]] = {}

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        kind = f"{str(context.get('message')).partition(chr(10))[0]}: {type(error).__name__}"
        at, kept_back = self._told.get(kind, (float("-inf"), 0))
        now = loop.time()
        if kind not in self._told and len(self._told) >= MAX_KINDS:
            return
        if now - at < REPEAT_S:
            self._told[kind] = (at, kept_back + 1)
            return
        self._told[kind] = (now, 0)
        # an OSError's trace leads to asyncio, and to read it takes a file descriptor
        trace = error if error is not None and not isinstance(error, OSError) else None
        log.error(
            "trouble in the event loop",
            exc_info=trace,
            extra={"reason": f"{kind}: {error}", "kept_back": kept_back},
        )


def for_commands() -> None:
    """What a command logs that sets up nothing: warnings on standard error, as clean as the service's."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(TextFormatter())


def setup(
    level: str = "info",
    format: Format = "json",  # noqa: A002 # its name in the settings
    stream: TextIO | None = None,
) -> Callable[[], None]:
    """Send all logs of at least `level` to `stream` (standard error) in `format`.

    Returns what flushes and stops the listener's thread and puts the root logger back as it was.
    """
    output = logging.StreamHandler(stream or sys.stderr)
    output.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    waiting: queue.Queue[logging.LogRecord] = queue.Queue(QUEUE)
    handler = _Queue(waiting)
    root = logging.getLogger()
    before, before_level = root.handlers[:], root.level
    listener = logging.handlers.QueueListener(waiting, output)
    _replace(root, before, [handler])
    root.setLevel(level.upper())
    listener.start()
    hooks = sys.unraisablehook, threading.excepthook
    sys.unraisablehook, threading.excepthook = _unraisable, _ended_thread

    def stop() -> None:
        sys.unraisablehook, threading.excepthook = hooks
        _replace(root, [handler], before)
        root.setLevel(before_level)
        listener.stop()
        if handler.dropped:
            lost = logging.makeLogRecord(
                {
                    "name": __name__,
                    "levelno": logging.WARNING,
                    "levelname": "WARNING",
                    "msg": "log lines dropped",
                    "lines": handler.dropped,
                }
            )
            output.handle(lost)

    return stop


def _unraisable(found: sys.UnraisableHookArgs) -> None:
    log.error("exception that nothing handles", exc_info=found.exc_value)


def _ended_thread(found: threading.ExceptHookArgs) -> None:
    log.error("a thread crashed", exc_info=found.exc_value)


def _replace(
    root: logging.Logger, old: Iterable[logging.Handler], new: Iterable[logging.Handler]
) -> None:
    for handler in list(old):
        root.removeHandler(handler)
    for handler in new:
        root.addHandler(handler)

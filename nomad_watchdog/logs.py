"""Logs: one JSON object per line, or text for a terminal, without secrets and control characters.

Every secret that this process has read is replaced (`secret_values`). In addition, patterns hide text that looks like
another secret.
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
from typing import Final, Literal, TextIO

from nomad_watchdog.secret_values import REDACTED, hide, longest

log = logging.getLogger(__name__)

Format = Literal["json", "text"]

MAX_CHARS: Final = 2_000
"""Maximum characters of a value; the rest is cut, and its length is logged."""
MAX_TRACE_CHARS: Final = 8_000
MAX_ITEMS: Final = 50
"""Maximum items of a list or mapping."""
MAX_DEPTH: Final = 4
QUEUE: Final = 10_000
"""Maximum number of lines that wait for a slow output; later ones are dropped."""

REPEAT_S: Final = 10.0
"""Minimum interval between log lines about one kind of error in the event loop."""
LASTING_S: Final = 600.0
"""A problem that lasts is logged again after this time."""
MAX_KINDS: Final = 100
codecs.lookup("unicode_escape")
# Loaded now, because a process without free file descriptors could not load it to log that.

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
    """A problem that may last: logged when it begins, every LASTING_S while it lasts, and when it ends."""

    def __init__(self, logger: logging.Logger, what: str) -> None:
        self._logger = logger
        self._what = what
        self._over = f"over: {what}"
        self._since: float | None = None
        self._logged_at = 0.0

    def goes_on(self, now: float, reason: str) -> None:
        """The problem was observed. `now`: monotonic seconds."""
        if self._since is None:
            self._since = now
        elif now - self._logged_at < LASTING_S:
            return
        self._logged_at = now
        self._logger.warning(
            self._what, extra={"reason": reason, "lasted_s": round(now - self._since, 1)}
        )

    def over(self, now: float) -> float:
        """The problem has ended; its duration in seconds, 0 = there was none."""
        if self._since is None:
            return 0.0
        lasted_s, self._since = round(now - self._since, 1), None
        self._logger.warning(self._over, extra={"lasted_s": lasted_s})
        return lasted_s


def clean(value: object, depth: int = 0) -> object:
    """The value for JSON: bounded, printable, without secrets."""
    if value is None or isinstance(value, bool | int | float):
        return value if not isinstance(value, float) or value - value == 0 else str(value)
    if isinstance(value, str):
        return clean_text(value)
    if depth < MAX_DEPTH and isinstance(value, Mapping):
        return {
            clean_text(str(key)): REDACTED
            if _SECRET_KEY.search(str(key))
            else clean(item, depth + 1)
            for key, item in list(value.items())[:MAX_ITEMS]
        }
    if depth < MAX_DEPTH and isinstance(value, list | tuple | set | frozenset):
        return [clean(item, depth + 1) for item in list(value)[:MAX_ITEMS]]
    return clean_text(str(value))


def clean_text(text: str, most: int = MAX_CHARS) -> str:
    """The text without secrets, cut, and with every unprintable character escaped."""
    # It is cut with a margin first, so that a huge value is not searched as a whole. Text at the end of the margin
    # that may be the beginning of a secret is removed, because hiding earlier secrets could move it into the result.
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
        facts["exc"] = clean_text(record.exc_text, MAX_TRACE_CHARS)
    return facts


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class JsonFormatter(logging.Formatter):
    """Keys ts (RFC 3339, UTC), level, logger, msg, then the extra fields in their order."""

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
    """Passes records to the listener's thread. If the queue is full, they are dropped and counted."""

    def __init__(self, waiting: queue.Queue[logging.LogRecord]) -> None:
        super().__init__(waiting)
        self.dropped = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        # Rendered in the caller's thread: an argument may change before the listener reads it, and only this thread
        # knows the token that the caller presented.
        if record.exc_info and not record.exc_text:
            record.exc_text = hide(logging.Formatter().formatException(record.exc_info))
        record.msg, record.args, record.exc_info = hide(record.getMessage()), None, None
        for key, value in list(vars(record).items()):
            if key not in _OWN:
                setattr(record, key, clean(value))
        record.cleaned = True  # cutting a text twice would log a wrong length
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1


class LoopErrors:
    """Exception handler of an event loop, with a rate limit. A process without free file descriptors reports hundreds
    of failed accepts per second, each with its traceback (S9, isolation)."""

    def __init__(self) -> None:
        self._logged: dict[str, tuple[float, int]] = {}

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        error = context.get("exception")
        kind = f"{str(context.get('message')).partition(chr(10))[0]}: {type(error).__name__}"
        at, kept_back = self._logged.get(kind, (float("-inf"), 0))
        now = loop.time()
        if kind not in self._logged and len(self._logged) >= MAX_KINDS:
            return
        if now - at < REPEAT_S:
            self._logged[kind] = (at, kept_back + 1)
            return
        self._logged[kind] = (now, 0)
        # The traceback of an OSError only shows asyncio, and reading it needs a file descriptor.
        trace = error if isinstance(error, Exception) and not isinstance(error, OSError) else None
        log.error(
            "error in the event loop",
            exc_info=trace,
            extra={"reason": f"{kind}: {error}", "kept_back": kept_back},
        )


def for_commands() -> None:
    """Format the warnings of commands, which go to standard error, as those of the service."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(TextFormatter())


def setup(
    level: str = "info",
    format: Format = "json",  # noqa: A002 # its name in the settings
    stream: TextIO | None = None,
) -> Callable[[], None]:
    """Send all logs of at least `level` to `stream` (default: standard error) in `format`.

    Returns a function that flushes, stops the listener's thread, and restores the root logger.
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
    log.error("unhandled exception", exc_info=found.exc_value)


def _ended_thread(found: threading.ExceptHookArgs) -> None:
    log.error("thread crashed", exc_info=found.exc_value)


def _replace(
    root: logging.Logger, old: Iterable[logging.Handler], new: Iterable[logging.Handler]
) -> None:
    for handler in list(old):
        root.removeHandler(handler)
    for handler in new:
        root.addHandler(handler)

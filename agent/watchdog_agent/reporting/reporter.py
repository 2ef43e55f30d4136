"""Reports to the control plane on each change and at the report interval; buffered while it is unreachable.

An agent that cannot reach the control plane may be cut off itself: a confirmation since the last answer may be caused
by its own host, and is reported as not confirmed until it is confirmed again (S6). Failed rounds before that do
not count either, so a restart of the control plane delays a true `offline` by that time.
"""

from __future__ import annotations

import os
import time

from watchdog_agent import wire
from watchdog_agent.runtime import http, parsing, secrets, transport
from watchdog_agent.runtime.loop import between
from watchdog_agent.runtime.stdlib_light import deque, json

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from watchdog_agent.runtime.loop import Loop
    from watchdog_agent.runtime.status_types import ReportCounts
    from watchdog_agent.runtime.types import Config, Log, Timer
    from watchdog_agent.wire import HostPressure, Report


_LATER = (408, 409, 425, 429)
"""4xx statuses after which the same report is sent again."""


class Reporter:
    """Sends one report at a time. `retire(reason, departed)` is called on a 410."""

    TIMEOUT_S = 3.0
    BUFFER = 64
    MAX_WAIT_S = 30.0
    MAX_KNOWN = 8
    TROUBLE_AFTER = 3
    """Consecutive failures after which missing answers count as trouble; a refusal does at once."""
    REMIND_S = 3600.0
    """Interval at which the same failure is logged again, in seconds."""

    def __init__(
        self,
        loop: Loop,
        config: Config,
        make: Callable[[int, int, bool], Report],
        retire: Callable[[str, bool], None],
        log: Log,
    ) -> None:
        """`make(sequence, dropped, stopping)` returns a report of the current state."""
        self.loop = loop
        self.make = make
        self.retire = retire
        self.log = log
        self.configured = list(config.get("api", []))
        self.known = self.configured
        self.urls = [http.Url(url, tls=True) for url in self.configured]
        self.credential = config.get("credential", "")
        self.tls: ssl.SSLContext | None = None
        if any(url.secure for url in self.urls):
            from watchdog_agent.runtime import tls

            self.tls = tls.context_of(config.get("ca_cert", ""))
        self.beat_s = config.get("beat_s", 15.0)
        self.sequence = 0
        self.sent = self.failed = self.dropped = 0
        self.waiting: deque[Report] = deque()
        self._aged_at = 0.0
        """When `state_age_s` of the queued reports was last updated."""
        self.fetch: http.HttpRequest | None = None
        self.failures = 0
        self.chosen = 0
        self.last_error = ""
        self.trouble = ""
        """Why no report is accepted, in words; empty otherwise. Changes only when the reason does."""
        self._trouble_is: int | str | None = ""
        self._logged_at = float("-inf")
        self.timer: Timer | None = None
        self.closing: Callable[[], None] | None = None
        self.on_status: Callable[[int | None, bool], None] | None = None
        """Called with the status of each report, None = no answer, and whether the answer forbids repairs."""
        self.unanswered = False
        """Whether the last call got no answer."""
        self.answered_at = float("-inf")
        self.confirmed_since: Callable[[float], bool] = lambda _since: False
        """Whether the device was confirmed to be offline since then."""
        self.on_reconnected: Callable[[bool], None] = lambda _isolated: None
        """Called when a report is answered again, with the previous value of `isolated`."""
        self.after_answer: Callable[[int | None], None] = lambda _status: None
        """Called with the status of each report, like `on_status`, but after the answer was processed."""
        self.on_isolated: Callable[[], object] = lambda: None
        """Called when a call without an answer has set `isolated`."""
        self.on_condition: Callable[[object], None] = lambda _condition: None
        """Called with the device's condition, if an answer has one."""
        self.pressure: Callable[[], HostPressure] | None = None
        """Reads the host's pressure; None = the control plane does not ask for it."""

    @property
    def isolated(self) -> bool:
        """Whether the device was confirmed to be offline while no report was answered."""
        return self.unanswered and self.confirmed_since(self.answered_at)

    def start(self) -> None:
        """Start periodic reports."""
        self.changed()
        self._beat()

    def _beat(self) -> None:
        self.loop.later(self.beat_s * between(0.9, 1.1), self._beat)
        if not self.waiting and self.fetch is None and self.closing is None:
            self.changed()

    def changed(self, *, stopping: bool = False) -> None:
        """Queue a report, because something has changed."""
        if not self.urls:
            return
        self.sequence += 1
        self._age()
        if len(self.waiting) >= self.BUFFER:
            # The first one may be in progress: it stays until its answer arrives.
            del self.waiting[1 if self.fetch is not None else 0]
            self.dropped += 1
        self.waiting.append(self.make(self.sequence, self.dropped, stopping))
        if self.fetch is None and self.timer is None:
            self._send()

    def _send(self) -> None:
        self.timer = None
        if not self.waiting or self.fetch is not None:
            return
        self._unclaim()
        self._age()
        self._add_pressure(self.waiting[0])
        url = self.urls[self.chosen % len(self.urls)]
        body = json.dumps(self.waiting[0]).encode()
        token = self.credential or read_token()
        headers = [("Authorization", f"Bearer {token}")] if token else []
        data = http.request("POST", url.base + wire.REPORT_PATH, url.host_header, body, headers)
        self.fetch = transport.send(self.loop, url, data, self.TIMEOUT_S, self._answered, self.tls)

    def _age(self) -> None:
        """Update the age of the state in each queued report, so that it is correct when the report is sent."""
        now = time.monotonic()
        for one in self.waiting:
            one["state_age_s"] = round(one["state_age_s"] + now - self._aged_at, 3)
        self._aged_at = now

    def _add_pressure(self, report: Report) -> None:
        """Add the host's pressure, if it is asked for. It is read when the report is sent: the control plane takes the
        time of arrival for that of the reading."""
        if self.pressure is not None:
            report["pressure"] = self.pressure()
        else:
            report.pop("pressure", None)

    def _unclaim(self) -> bool:
        """Return `isolated`; if true, clear `confirmed` in all queued reports."""
        isolated = self.isolated
        for one in self.waiting if isolated else ():
            one["confirmed"] = False
        return isolated

    def _answered(
        self, status: int | None, headers: dict[str, str], body: bytes, reason: str
    ) -> None:
        self.fetch = None
        if self.on_status is not None:
            self.on_status(status, status == 200 and holds_repairs(body))
        again, isolated = self.unanswered and status is not None, self._unclaim()
        self.unanswered = status is None
        if status is not None:
            self.answered_at = time.monotonic()
        self._process(status, headers, body, reason)
        self.after_answer(status)
        if again:
            self.on_reconnected(isolated)
        elif self.isolated and not isolated:
            self.on_isolated()

    def _process(
        self, status: int | None, headers: dict[str, str], body: bytes, reason: str
    ) -> None:
        """Remove the report from the queue, or retry it."""
        if status == 200:
            self._accepted(body)
        elif status == 410:
            self.waiting.clear()
            self._set_trouble(status, body, reason)
            self.retire(reason_of(body), code_of(body) == wire.DEPARTED)
        else:
            self._failed(status, headers, body, reason)
        if self.closing is not None and not (status == 200 and self.waiting):
            self._closed()

    def _accepted(self, body: bytes) -> None:
        self.sent += 1
        self.failures = 0
        self.waiting.popleft()
        self.trouble = self._trouble_is = ""
        if self.last_error:
            self.last_error = ""
            self.log("reports are accepted again")
        self._apply(body)
        if self.waiting:
            self._send()

    def _failed(
        self, status: int | None, headers: dict[str, str], body: bytes, reason: str
    ) -> None:
        self.failed += 1
        self.failures += 1
        refused = status is not None and 400 <= status < 500 and status not in _LATER
        if refused:
            self.waiting.popleft()  # the same report would be refused again
        if refused or self.failures >= self.TROUBLE_AFTER:
            self._set_trouble(status, body, reason)
        error = reason if status is None else f"status {status}"
        now = time.monotonic()
        if error != self.last_error or now - self._logged_at >= self.REMIND_S:
            self.last_error, self._logged_at = error, now
            if refused:
                self.log(f"report refused with {status}: {reason_of(body)}")
            else:
                self.log(f"report failed: {error}")
        if self.closing is not None:
            return
        self.chosen += 1
        wait = between(0.1, min(self.MAX_WAIT_S, 0.25 * 2 ** min(self.failures, 8)))
        wait = max(wait, http.retry_after(headers, self.MAX_WAIT_S))
        self.timer = self.loop.later(wait, self._send)

    def _set_trouble(self, status: int | None, body: bytes, reason: str) -> None:
        if self.trouble and status == self._trouble_is:
            return
        self._trouble_is = status
        where = self.known[self.chosen % len(self.known)]
        if status is None:
            self.trouble = f"no answer from {where} to its reports: {reason}"
        elif 400 <= status < 500 and status not in _LATER:
            self.trouble = f"its reports are refused by {where} with {status}: {reason_of(body)}"
        else:
            self.trouble = f"{where} answers its reports with {status}: {reason_of(body)}"

    def _apply(self, body: bytes) -> None:
        """Apply the device's condition and the other replicas, if the answer has them, and whether it asks for the
        host's pressure."""
        try:
            answer = parsing.loads(body)
        except ValueError:
            return
        if isinstance(answer, dict):
            self._replicas(answer)
            self._asked_for_pressure(answer.get("pressure") is True)
            if "condition" in answer:
                self.on_condition(answer["condition"])

    def _asked_for_pressure(self, asked: bool) -> None:
        if not asked:
            self.pressure = None
        elif self.pressure is None:
            from watchdog_agent.reporting import host_pressure

            self.pressure = host_pressure.read

    def _replicas(self, answer: dict[str, list[str]]) -> None:
        """Store other replicas' addresses from an answer: they are tried after the configured ones when the current
        address does not answer. They must be as secure as those, or are ignored."""
        try:
            others = answer["api"][: self.MAX_KNOWN]
            found = self.configured + [one for one in others if one not in self.configured]
            if found == self.known:
                return
            urls = [http.Url(url, tls=True) for url in found]
        except (ValueError, KeyError, TypeError, AttributeError):
            return
        if all(url.secure == self.urls[0].secure for url in urls):
            using = self.known[self.chosen % len(self.known)]
            self.known, self.urls = found, urls
            self.chosen = found.index(using) if using in found else 0

    def status(self) -> ReportCounts:
        """The reporter's part of /status."""
        return {
            "sent": self.sent,
            "failed": self.failed,
            "dropped": self.dropped,
            "trouble": self.trouble,
        }

    def close(self, then: Callable[[], None]) -> None:
        """Send a last report and call back, after at most one second."""
        self.closing = then
        if not self.urls:
            self._closed()
            return
        if self.fetch is not None:
            self.fetch.cancel()
            self.fetch = None
        if self.timer is not None:
            self.timer[2] = None
            self.timer = None
        self.waiting.clear()
        self.loop.later(1.0, self._closed)
        self.changed(stopping=True)

    def _closed(self) -> None:
        then, self.closing = self.closing, None
        if self.fetch is not None:
            self.fetch.cancel()
            self.fetch = None
        self.urls = []
        if then is not None:
            then()


def holds_repairs(body: bytes) -> bool:
    """Whether the answer to an accepted report forbids repairs."""
    try:
        return b"hold_repairs" in body and parsing.loads(body)["hold_repairs"] is True
    except (ValueError, KeyError, TypeError):
        return False


def reason_of(body: bytes) -> str:
    """The message of an API error response, else the beginning of the body."""
    try:
        return str(parsing.loads(body)["error"]["message"])[:200]
    except (ValueError, KeyError, TypeError):
        return ascii(body[:80])


def code_of(body: bytes) -> str:
    """The code of an API error response; "" if there is none."""
    try:
        return str(parsing.loads(body)["error"]["code"])[:80]
    except (ValueError, KeyError, TypeError):
        return ""


def read_token() -> str:
    """Read the bearer token; again for each report, because mounted files rotate."""
    return secrets.token(os.environ.get("WATCHDOG_TOKEN_FILE", ""))

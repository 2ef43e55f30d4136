"""One agent's part in the election of the agent that escalates an anomaly.

It writes a note, polls the group, tries to take the lock, gathers members, sends the alert, and leaves.

`escalation.election` decides; this module calls Consul and waits.
"""

from __future__ import annotations

import time

from watchdog_agent.escalation import election
from watchdog_agent.runtime.loop import between

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from watchdog_agent.consul.kv import Kv
    from watchdog_agent.runtime.http import HttpRequest
    from watchdog_agent.runtime.loop import Loop
    from watchdog_agent.runtime.types import Config, EscalationEntry, GroupAlert, KvEntry, Timer

    class Owner(Protocol):
        """The owner of a round, which holds the session."""

        loop: Loop
        config: Config
        kv: Kv
        escalate: Callable[..., None]
        session: str

        def with_session(self, then: Callable[[str], None]) -> None: ...
        def note(self, entry: EscalationEntry, episode: str) -> dict[str, str | float]: ...
        def lost(self) -> None: ...
        def sweep(self) -> None: ...
        def end(self, it: ElectionRound) -> None: ...


class ElectionRound:
    """One anomaly from its note to its alert."""

    def __init__(
        self,
        owner: Owner,
        entry: EscalationEntry,
        group: tuple[str, str],
        done: Callable[..., None],
    ) -> None:
        self.owner, self.entry, self.group, self.done = owner, entry, group, done
        self.kv, self.loop = owner.kv, owner.loop
        rules = owner.config["escalate"]
        self.gather_s: float = rules["gather_s"]
        self.window_s: float = rules["window_s"]
        self.consul_wait_s: float = rules["consul_wait_s"]
        self.folder = election.folder_of(entry)
        self.note = f"{self.folder}/{owner.config['slug']}"
        self.reached = time.monotonic()
        self.leading = self.sending = self.over = self.finishing = False
        self.withdrawn: Callable[[], None] | None = None
        """Called after a withdrawal that had to wait for a call in progress."""
        self.began = self.newest = 0.0
        self.seen: set[str] = set()
        self.polls = 0
        self.resigned_until = 0.0
        self.timer: Timer | None = None
        self.fetch: HttpRequest | None = None

    # -- participating

    def start(self) -> None:
        """Write this agent's note."""
        self.owner.with_session(self._post)

    def restart(self) -> None:
        """Start again after the session is lost, unless the alert is being sent: its document has the alert and its key."""
        if not self.sending and not self.over:
            self.leading = False
            self._later(between(0.1, 0.5), self.start)

    def _post(self, session: str) -> None:
        if self.over:
            return
        if not session:
            self._failed()
            return
        self.fetch = self.kv.put(self.note, f"acquire={session}", self._value(), self._posted)

    def _value(self, episode: str = "") -> dict[str, str | float]:
        return self.owner.note(self.entry, episode)

    def _posted(self, taken: bool | None, reason: str) -> None:
        if self.over:
            return
        if taken is None:
            self._failed(reason)
        elif taken:
            self._reached()
            self._later(self.gather_s * between(0.5, 1.0), self._poll)
        else:
            # Locked by the session of an earlier run of this agent. Locks are advisory.
            self.kv.delete(self.note, lambda _ok: self._failed())

    def _reached(self) -> None:
        self.reached = time.monotonic()

    def _failed(self, reason: str = "") -> None:
        """A call to Consul failed: retry soon, and escalate without Consul after consul_wait_s."""
        if self.over:
            return
        if "invalid session" in reason:
            self.owner.lost()
        elif time.monotonic() - self.reached > self.consul_wait_s:
            self._escalate_alone()
        else:
            self._later(between(0.3, 1.0), self._lead if self.leading else self.start)

    def _poll(self) -> None:
        """Check whether the alert is sent, and whether another agent is about to send it."""
        self.fetch = self.kv.listed(f"{self.folder}/_", self._polled)

    def _polled(self, found: list[KvEntry] | None, reason: str) -> None:
        if self.over:
            return
        if found is None:
            self._failed(reason)
            return
        self._reached()
        entries = {one["name"].rpartition("/")[2]: one for one in found}
        alert = election.checked(entries["_told"]["value"]) if "_told" in entries else None
        if election.covers(alert, self.entry["id"]):
            assert alert is not None
            self._finish(alert["episode"])
        elif (
            "_leader" in entries and entries["_leader"]["session"]
        ) or time.monotonic() < self.resigned_until:
            # The interval grows: a successor is needed within seconds, not immediately.
            self.polls += 1
            wait = min(self.gather_s * 1.2**self.polls, max(self.gather_s, 5.0))
            self._later(wait * between(0.8, 1.2), self._poll)
        else:
            self.owner.with_session(self._campaign)

    def _campaign(self, session: str) -> None:
        if self.over:
            return
        if not session:
            self._failed()
            return
        body = {"slug": self.owner.config["slug"]}
        path = f"{self.folder}/_leader"
        self.fetch = self.kv.put(path, f"acquire={session}", body, self._campaigned)

    def _campaigned(self, taken: bool | None, reason: str) -> None:
        if self.over:
            return
        if taken is None:
            self._failed(reason)
        elif taken:
            self.leading = True
            self.began = self.newest = time.monotonic()
            self._lead()
        else:
            self._later(between(0.2, 1.0) * self.gather_s, self._poll)

    # -- leading

    def _lead(self) -> None:
        self.fetch = self.kv.listed(f"{self.folder}/", self._listed)

    def _listed(self, found: list[KvEntry] | None, reason: str) -> None:
        if self.over:
            return
        if found is None:
            self._failed(reason)
            return
        self._reached()
        present, alert, index = election.read_group(found)
        present[self.entry["id"]] = election.member_of(self.owner.config["device_id"], self.entry)
        if not present.keys() <= self.seen:
            self.newest = time.monotonic()
            self.seen |= present.keys()
        now = time.monotonic()
        takes_over = alert is not None and alert["state"] == "telling"
        wait = election.still_to_gather(self.began, self.newest, now, self.gather_s, self.window_s)
        if wait > 0 and not takes_over:
            self._later(min(wait, self.gather_s / 2) + 0.01, self._lead)
            return
        document, wait = election.next_document(alert, present, time.time(), self.window_s)
        if document is not None:
            self._write(document, index)
        elif wait > 0:
            self._later(min(wait, self.gather_s) + 0.01, self._lead)
        elif alert is not None and now < self.newest + self.window_s:
            # sent; an anomaly that joins within the window belongs to it
            self._report_done(alert["episode"])
            self._later(min(self.window_s, 5.0) * between(0.8, 1.0), self._lead)
        else:
            self.owner.sweep()
            self._finish(alert["episode"] if alert is not None else self.entry["id"])

    def _write(self, document: GroupAlert, index: int) -> None:
        """Write the document that a successor continues from, then send the alert."""

        def written(taken: bool | None, reason: str) -> None:
            if self.over:
                return
            if taken:
                self.sending = True
                self.owner.escalate(
                    document, self.group, self.entry, lambda ok: self._sent(document, ok)
                )
            elif taken is None:
                self._failed(reason)
            else:
                self._later(between(0.1, 0.5), self._lead)

        self.fetch = self.kv.put(f"{self.folder}/_told", f"cas={index}", document, written)

    def _sent(self, document: GroupAlert, taken: bool) -> None:
        self.sending = False
        if self.over:
            if taken:  # an update of an alert whose device has recovered meanwhile
                self._mark_sent(document)
            return
        if not taken and self._withdraw_if_asked():
            return
        if not taken:
            # Perhaps only this agent cannot reach the sinks: let another one try for a while.
            self.resigned_until = time.monotonic() + 2 * self.window_s
            self._release(f"{self.folder}/_leader")
            self.leading = False
            self._later(self.gather_s, self._poll)
        else:
            self._report_done(document["episode"])
            self._mark_sent(document)
            self._withdraw_if_asked()

    def _mark_sent(self, document: GroupAlert, tries: int = 0) -> None:
        """Record that the alert is sent. An agent that took over meanwhile has the same document and sends it again."""

        def found(entries: list[KvEntry] | None, _reason: str) -> None:
            alert = election.checked(entries[0]["value"]) if entries else None
            same = alert is not None and alert["rev"] == document["rev"]
            if entries and same and alert is not None and alert["episode"] == document["episode"]:
                query = f"cas={entries[0]['index']}"
                path = f"{self.folder}/_told"
                self.kv.put(path, query, election.finished(document, time.time()), written)
            else:
                written(None if entries is None else True, "")

        def written(taken: bool | None, _reason: str) -> None:
            if self.over:
                return
            if taken or tries > 20:
                self._reached()
                self._lead() if self.owner.session else self._finish(document["episode"])
            else:
                self._later(between(0.2, 0.8), lambda: self._mark_sent(document, tries + 1))

        # Not in `fetch`: it continues after the end of the round. Else a successor would send the alert again.
        self.kv.listed(f"{self.folder}/_told", found)

    # -- ending

    def _report_done(self, episode: str, *, coordinated: bool = True) -> None:
        self.done(episode, coordinated=coordinated)

    def _escalate_alone(self) -> None:
        self.stop()
        self.sending = True
        self.owner.end(self)
        document, _ = election.next_document(
            None,
            {self.entry["id"]: election.member_of(self.owner.config["device_id"], self.entry)},
            time.time(),
            self.window_s,
        )
        assert document is not None

        def alert(ok: bool) -> None:
            self.sending = False
            if ok:
                self._report_done(self.entry["id"], coordinated=False)
            self._withdraw_if_asked()

        self.owner.escalate(document, None, self.entry, alert)

    def _finish(self, episode: str) -> None:
        """The alert is sent: keep the note without a lock, which means that this device is still unhealthy."""
        self.stop()
        if self.leading:
            self._release(f"{self.folder}/_leader")
        session = self.owner.session
        query = f"release={session}" if session else "flags=0"
        self.finishing = True
        self.kv.put(self.note, query, self._value(episode), self._finished)
        self._report_done(episode)

    def _finished(self, *_: object) -> None:
        self.finishing = False
        if not self._withdraw_if_asked():
            self.owner.end(self)

    def _release(self, key: str) -> None:
        if session := self.owner.session:
            self.kv.put(key, f"release={session}", {}, lambda *_: None)

    def stop(self) -> None:
        """End this round."""
        self.over = True
        if self.timer is not None:
            self.timer[2] = None
        if self.fetch is not None:
            self.fetch.cancel()

    def withdraw(self, then: Callable[[], None]) -> None:
        """Withdraw because the device has recovered: delete this agent's note, then call back. Waits while the first alert or
        the last note is being sent."""
        if self.finishing or (self.sending and not self.entry["told"]):
            self.withdrawn = then
            return
        self.stop()
        if self.leading:
            self._release(f"{self.folder}/_leader")

        def deleted(_ok: bool) -> None:
            self.owner.end(self)
            then()

        self.kv.delete(self.note, deleted)

    def _withdraw_if_asked(self) -> bool:
        then, self.withdrawn = self.withdrawn, None
        if then is not None:
            self.withdraw(then)
        return then is not None

    def _later(self, delay_s: float, callback: Callable[[], None]) -> None:
        if self.timer is not None:
            self.timer[2] = None
        self.timer = self.loop.later(delay_s, callback)

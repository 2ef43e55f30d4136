"""One agent's part in electing who tells of an anomaly: put up a note, look, stand, lead, tell, leave.

`escalation.election` decides; this asks Consul and waits.
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
    from watchdog_agent.runtime.types import Config, Entry, KvEntry, Timer, Told

    class Owner(Protocol):
        """Whose round it is: it holds the session."""

        loop: Loop
        config: Config
        kv: Kv
        tell: Callable[..., None]
        session: str

        def with_session(self, then: Callable[[str], None]) -> None: ...
        def note(self, entry: Entry, episode: str) -> dict[str, str | float]: ...
        def lost(self) -> None: ...
        def sweep(self) -> None: ...
        def end(self, it: ElectionRound) -> None: ...


class ElectionRound:
    """One anomaly on its way to be told."""

    def __init__(
        self,
        owner: Owner,
        entry: Entry,
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
        self.leading = self.telling = self.over = self.settling = False
        self.withdrawn: Callable[[], None] | None = None
        """What comes after the withdrawal that waits until what is under way is done."""
        self.began = self.newest = 0.0
        self.seen: set[str] = set()
        self.polls = 0
        self.resigned_until = 0.0
        self.timer: Timer | None = None
        self.fetch: HttpRequest | None = None

    # -- taking part

    def start(self) -> None:
        """Put up our note."""
        self.owner.with_session(self._post)

    def restart(self) -> None:
        """Our session is lost. One that is telling goes on: its document says what, and under which key."""
        if not self.telling and not self.over:
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
            self._later(self.gather_s * between(0.5, 1.0), self._look)
        else:
            # Locked by the session of an earlier run of this agent, which is dead: locks are advisory.
            self.kv.delete(self.note, lambda _ok: self._failed())

    def _reached(self) -> None:
        self.reached = time.monotonic()

    def _failed(self, reason: str = "") -> None:
        """Consul did not do it: again in a moment, and after consul_wait_s without it."""
        if self.over:
            return
        if "invalid session" in reason:
            self.owner.lost()
        elif time.monotonic() - self.reached > self.consul_wait_s:
            self._alone()
        else:
            self._later(between(0.3, 1.0), self._lead if self.leading else self.start)

    def _look(self) -> None:
        """Whether it is told, and whether anybody is about to."""
        self.fetch = self.kv.listed(f"{self.folder}/_", self._looked)

    def _looked(self, found: list[KvEntry] | None, reason: str) -> None:
        if self.over:
            return
        if found is None:
            self._failed(reason)
            return
        self._reached()
        kept = {one["name"].rpartition("/")[2]: one for one in found}
        told = election.checked(kept["_told"]["value"]) if "_told" in kept else None
        if election.covers(told, self.entry["id"]):
            assert told is not None
            self._settle(told["episode"])
        elif (
            "_leader" in kept and kept["_leader"]["session"]
        ) or time.monotonic() < self.resigned_until:
            # the longer it takes, the rarer we ask: an heir is wanted in seconds, not at once
            self.polls += 1
            wait = min(self.gather_s * 1.2**self.polls, max(self.gather_s, 5.0))
            self._later(wait * between(0.8, 1.2), self._look)
        else:
            self.owner.with_session(self._stand)

    def _stand(self, session: str) -> None:
        if self.over:
            return
        if not session:
            self._failed()
            return
        body = {"slug": self.owner.config["slug"]}
        path = f"{self.folder}/_leader"
        self.fetch = self.kv.put(path, f"acquire={session}", body, self._stood)

    def _stood(self, taken: bool | None, reason: str) -> None:
        if self.over:
            return
        if taken is None:
            self._failed(reason)
        elif taken:
            self.leading = True
            self.began = self.newest = time.monotonic()
            self._lead()
        else:
            self._later(between(0.2, 1.0) * self.gather_s, self._look)

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
        present, told, index = election.read_group(found)
        present[self.entry["id"]] = election.member_of(self.owner.config["device_id"], self.entry)
        if not present.keys() <= self.seen:
            self.newest = time.monotonic()
            self.seen |= present.keys()
        now = time.monotonic()
        heir = told is not None and told["state"] == "telling"
        wait = election.still_to_gather(self.began, self.newest, now, self.gather_s, self.window_s)
        if wait > 0 and not heir:
            self._later(min(wait, self.gather_s / 2) + 0.01, self._lead)
            return
        document, wait = election.next_document(told, present, time.time(), self.window_s)
        if document is not None:
            self._write(document, index)
        elif wait > 0:
            self._later(min(wait, self.gather_s) + 0.01, self._lead)
        elif told is not None and now < self.newest + self.window_s:
            # told; who comes within the window still belongs to it
            self._tell_owner(told["episode"])
            self._later(min(self.window_s, 5.0) * between(0.8, 1.0), self._lead)
        else:
            self.owner.sweep()
            self._settle(told["episode"] if told is not None else self.entry["id"])

    def _write(self, document: Told, index: int) -> None:
        """Nothing is said before the document that others would go on from is there."""

        def written(taken: bool | None, reason: str) -> None:
            if self.over:
                return
            if taken:
                self.telling = True
                self.owner.tell(
                    document, self.group, self.entry, lambda ok: self._told(document, ok)
                )
            elif taken is None:
                self._failed(reason)
            else:
                self._later(between(0.1, 0.5), self._lead)

        self.fetch = self.kv.put(f"{self.folder}/_told", f"cas={index}", document, written)

    def _told(self, document: Told, taken: bool) -> None:
        self.telling = False
        if self.over:
            return
        if not taken and self._withdraws():
            return
        if not taken:
            # Our way to the sinks may be broken and another's not: step back for a while.
            self.resigned_until = time.monotonic() + 2 * self.window_s
            self._release(f"{self.folder}/_leader")
            self.leading = False
            self._later(self.gather_s, self._look)
        else:
            self._tell_owner(document["episode"])
            self._mark(document)
            self._withdraws()

    def _mark(self, document: Told, tries: int = 0) -> None:
        """Write that it is told; whoever took over meanwhile has the same document, and says it again."""

        def found(entries: list[KvEntry] | None, _reason: str) -> None:
            told = election.checked(entries[0]["value"]) if entries else None
            same = told is not None and told["rev"] == document["rev"]
            if entries and same and told is not None and told["episode"] == document["episode"]:
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
                self._lead() if self.owner.session else self._settle(document["episode"])
            else:
                self._later(between(0.2, 0.8), lambda: self._mark(document, tries + 1))

        self.fetch = self.kv.listed(f"{self.folder}/_told", found)

    # -- ending

    def _tell_owner(self, episode: str, *, coordinated: bool = True) -> None:
        self.done(episode, coordinated=coordinated)

    def _alone(self) -> None:
        self.stop()
        self.telling = True
        self.owner.end(self)
        document, _ = election.next_document(
            None,
            {self.entry["id"]: election.member_of(self.owner.config["device_id"], self.entry)},
            time.time(),
            self.window_s,
        )
        assert document is not None

        def told(ok: bool) -> None:
            self.telling = False
            if ok:
                self._tell_owner(self.entry["id"], coordinated=False)
            self._withdraws()

        self.owner.tell(document, None, self.entry, told)

    def _settle(self, episode: str) -> None:
        """It is told: leave the note without a lock, as a sign that this device is still away."""
        self.stop()
        if self.leading:
            self._release(f"{self.folder}/_leader")
        session = self.owner.session
        query = f"release={session}" if session else "flags=0"
        self.settling = True
        self.kv.put(self.note, query, self._value(episode), self._has_settled)
        self._tell_owner(episode)

    def _has_settled(self, *_: object) -> None:
        self.settling = False
        if not self._withdraws():
            self.owner.end(self)

    def _release(self, key: str) -> None:
        if session := self.owner.session:
            self.kv.put(key, f"release={session}", {}, lambda *_: None)

    def stop(self) -> None:
        """Nothing more happens in this round."""
        self.over = True
        if self.timer is not None:
            self.timer[2] = None
        if self.fetch is not None:
            self.fetch.cancel()

    def withdraw(self, then: Callable[[], None]) -> None:
        """The device has recovered: take our note away, and `then` go on. While a receiver hears of the
        beginning, or our last note is on its way to Consul, this waits for it."""
        if self.telling or self.settling:
            self.withdrawn = then
            return
        self.stop()
        if self.leading:
            self._release(f"{self.folder}/_leader")

        def deleted(_ok: bool) -> None:
            self.owner.end(self)
            then()

        self.kv.delete(self.note, deleted)

    def _withdraws(self) -> bool:
        then, self.withdrawn = self.withdrawn, None
        if then is not None:
            self.withdraw(then)
        return then is not None

    def _later(self, delay_s: float, callback: Callable[[], None]) -> None:
        if self.timer is not None:
            self.timer[2] = None
        self.timer = self.loop.later(delay_s, callback)

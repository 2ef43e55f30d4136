"""Agents that detect the same anomaly elect one of them to escalate it, through Consul's KV store.

Imported with the first anomaly: before that, an agent writes nothing to Consul for this and holds no session.
Keys below ``<prefix>/anomalies/<group>/``:

=============  =========================================================================
``<slug>``     the note of one agent, locked by its session; unlocked once the alert is sent,
               with its expiry time; deleted when its device has recovered
``_leader``    the lock; its holder sends the alert
``_told``      the alert that is being sent or was sent (`escalation.election`)
=============  =========================================================================

A session has a TTL and no lock delay, and deletes the keys it locked when it ends: the note and lock
of a dead agent are gone after at most 2 x TTL, those of a stopped agent at once. If Consul does not
answer for `consul_wait_s`, the agent escalates on its own, marked ``uncoordinated``.
"""

from __future__ import annotations

import time

from watchdog_agent.consul.kv import Kv
from watchdog_agent.escalation import election
from watchdog_agent.escalation.election_round import ElectionRound
from watchdog_agent.runtime import parsing
from watchdog_agent.runtime.loop import between

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from watchdog_agent.runtime.loop import Loop
    from watchdog_agent.runtime.types import Config, EscalationEntry, KvEntry, Timer


class Coordinator:
    """The session of this agent, and its rounds: one per anomaly whose alert is not sent yet."""

    CLOSE_S = 0.4

    def __init__(self, loop: Loop, config: Config, escalate: Callable[..., None]) -> None:
        """`escalate(document, group, own, done)` sends an escalation; `done(accepted)` when all sinks have finished."""
        self.loop, self.config, self.escalate = loop, config, escalate
        self.kv = Kv(loop, config, "anomalies")
        rules = config["escalate"]
        self.ttl_s: float = rules["session_ttl_s"]
        self.rounds: list[ElectionRound] = []
        self.session = ""
        self.waiting: list[Callable[[str], None]] = []
        self.timer: Timer | None = None
        self.closed = False

    def begin(
        self, entry: EscalationEntry, group: tuple[str, str], done: Callable[..., None]
    ) -> ElectionRound:
        """Take part in the election. `done(episode, coordinated)` when this or another agent has sent the alert."""
        it = ElectionRound(self, entry, group, done)
        self.rounds.append(it)
        it.start()
        return it

    def note(self, entry: EscalationEntry, episode: str) -> dict[str, str | float]:
        """The note of an anomaly, for the other agents."""
        every_s = self.config["escalate"]["note_s"]
        return note_of(entry, self.config["device_id"], every_s, episode)

    def sweep(self) -> None:
        """Delete what agents that are gone have left behind."""
        sweep(self.kv)

    def end(self, it: ElectionRound) -> None:
        """End a round; the last one also ends the session."""
        if it in self.rounds:
            self.rounds.remove(it)
        if not self.rounds:
            self._drop()

    def with_session(self, then: Callable[[str], None]) -> None:
        """Call back with the session's ID, creating a session if there is none; "" if that failed."""
        if self.session:
            then(self.session)
            return
        self.waiting.append(then)
        if len(self.waiting) == 1:
            body = {
                "Name": "watchdog-agent",
                "TTL": f"{self.ttl_s:g}s",
                "LockDelay": "0s",
                "Behavior": "delete",
                # Without serfHealth, so that a short gossip failure does not cause an election.
                "NodeChecks": [],
            }
            self.kv.call("PUT", "/session/create", body, self._made)

    def _made(
        self, status: int | None, _headers: dict[str, str], body: bytes, _reason: str
    ) -> None:
        try:
            self.session = str(parsing.loads(body)["ID"]) if status == 200 else ""
        except (ValueError, KeyError, TypeError):
            self.session = ""
        waiting, self.waiting = self.waiting, []
        if self.closed:
            self._drop()
            return
        if self.session:
            self.timer = self.loop.later(self.ttl_s / 3, self._renew)
        for then in waiting:
            then(self.session)
        if not self.rounds:
            self._drop()

    def _renew(self) -> None:
        session = self.session

        def answered(
            status: int | None, _headers: dict[str, str], _body: bytes, _reason: str
        ) -> None:
            if self.session != session or not session:
                return
            if status == 404:
                self.lost()
                return
            # Retry a failed renewal sooner: another attempt still fits into the TTL.
            self.timer = self.loop.later(self.ttl_s / (3 if status == 200 else 6), self._renew)

        if session:
            self.kv.call("PUT", f"/session/renew/{session}", None, answered)

    def lost(self) -> None:
        """The session has expired in Consul, with its notes: restart the waiting rounds."""
        self._forget()
        for it in list(self.rounds):
            it.restart()

    def _forget(self) -> str:
        if self.timer is not None:
            self.timer[2] = None
            self.timer = None
        session, self.session = self.session, ""
        return session

    def _drop(self, then: Callable[[], None] = lambda: None) -> None:
        session = self._forget()
        if session:
            path = f"/session/destroy/{session}"
            self.kv.call("PUT", path, None, lambda *_: then(), self.CLOSE_S)
        else:
            then()

    def close(self, then: Callable[[], None]) -> None:
        """End all rounds and the session, which frees its locks for other agents at once."""
        self.closed = True
        for it in list(self.rounds):
            it.stop()
        self.rounds.clear()
        self._drop(then)


ENDED_TRIES = 20


def ended(
    kv: Kv, entry: EscalationEntry, done: Callable[[str], None], tries: int = ENDED_TRIES
) -> None:
    """Call `done(episode)` with the episode whose last anomaly this one was, or "". This agent's note must already be
    deleted. If Consul does not answer, it is the episode that this agent knows: a repeated ``resolved`` has the same key,
    and a missing one would leave the alert open."""

    def listed(found: list[KvEntry] | None, _reason: str) -> None:
        if found is None and not entry["told"] and tries > 1:
            kv.loop.later(between(1.0, 2.0), lambda: ended(kv, entry, done, tries - 1))
            return
        clean(kv, found or [])
        done(election.ended(found or [], entry, time.time()))

    kv.listed(f"{election.folder_of(entry)}/", listed)


MAX_CLEANED = 64
MAX_SWEPT = 1 << 18
"""Maximum size of the listing of all groups, in bytes."""


def clean(kv: Kv, found: list[KvEntry]) -> None:
    """Delete what agents that are gone have left in this listing, unless it has changed since."""
    for one in election.stale(found, time.time())[:MAX_CLEANED]:
        kv.delete(one["name"], lambda _ok: None, one["index"])


def sweep(kv: Kv) -> None:
    """Clean all groups: keys of a group whose agents are all gone are not read anywhere else."""
    kv.listed("", lambda found, _reason: clean(kv, found or []), MAX_SWEPT)


def note_of(
    entry: EscalationEntry, device_id: str, every_s: float, episode: str | None = None
) -> dict[str, str | float]:
    """The note of an anomaly; `every_s`: interval at which it is rewritten."""
    return {
        "id": entry["id"],
        "device_id": device_id,
        "reason": election.member_of(device_id, entry)[1],
        "told": entry["episode"] if episode is None else episode,
        "until": round(time.time() + 3 * every_s, 1),
    }


def refresh_note(
    kv: Kv,
    slug: str,
    entry: EscalationEntry,
    note: dict[str, str | float],
    written: Callable[[], None],
) -> None:
    """Rewrite the note of a sent alert; `written` is called in any case."""
    # A lock on it stays: only a query with a session changes that.
    query = "flags=0"
    kv.put(f"{election.folder_of(entry)}/{slug}", query, note, lambda *_: written())

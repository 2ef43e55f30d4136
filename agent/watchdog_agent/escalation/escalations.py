"""The escalations of this agent, from start to recovery.

`raise_` opens an escalation. The same key again has no effect until `clear`. Open escalations survive a restart
(`dump`, `restore`): an alert that was not sent before is sent afterwards, with the same key.
"""

from __future__ import annotations

import os
import time

from watchdog_agent.escalation import election
from watchdog_agent.escalation.sinks import Sink
from watchdog_agent.runtime.loop import between

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from watchdog_agent.consul.kv import Kv
    from watchdog_agent.escalation.coordinator import Coordinator
    from watchdog_agent.escalation.election_round import ElectionRound
    from watchdog_agent.runtime.loop import Loop
    from watchdog_agent.runtime.status_types import EscalationStatus
    from watchdog_agent.runtime.types import (
        Alert,
        Config,
        Document,
        EscalateRules,
        EscalationEntry,
        GroupAlert,
        Timer,
    )


class Escalations:
    """The open anomalies of one device, and the sinks. `config` has a checked ``escalate``."""

    MAX_OPEN = 16
    DEPART_S = 1.5
    """Time limit for resolving the alerts of a device that has left, in seconds."""
    POLL_S = 0.02
    RETURN_S = 5.0
    """Delay after a restart until the notes of open escalations are refreshed."""
    EVIDENCE_BYTES = 4096

    def __init__(self, loop: Loop, config: Config, instance: str, log: Callable[..., None]) -> None:
        self.loop, self.config, self.log = loop, config, log
        self.rules: EscalateRules = config["escalate"]
        self.sinks = [Sink(loop, one, config, instance, log) for one in self.rules["sinks"]]
        self.open: dict[str, EscalationEntry] = {}
        self.rounds: dict[str, ElectionRound] = {}
        self.coordination: Coordinator | None = None
        self.leaving = 0
        """Number of ended anomalies for which it is not known yet whether others of the episode are still open."""
        self.over = "recovered"
        self.refreshing: Timer | None = None
        self.on_change: Callable[[], object] = lambda: None
        """Called when the stored state has changed."""

    def raise_(self, key: str, summary: str, evidence: Mapping[str, object]) -> None:
        """Escalate an anomaly, alone or with those of other agents. `key`: its kind, such as ``offline``; letters, digits,
        - and _. `evidence`: JSON; its values of gateway, site, class and host determine the group it shares with
        others."""
        if key in self.open:
            return
        if len(self.open) >= self.MAX_OPEN:
            self.log("escalation dropped: too many are open", key=key)
            return
        entry: EscalationEntry = {
            "key": key,
            "id": os.urandom(8).hex(),
            "at": round(time.time(), 3),
            "summary": summary[:400],
            "evidence": self._bounded(evidence),
            "group": None,
            "episode": "",
            "told": False,
        }
        self.open[key] = entry
        self._begin(entry)
        self.on_change()

    def _bounded(self, evidence: Mapping[str, object]) -> Document:
        from watchdog_agent.runtime.stdlib_light import json

        text = json.dumps(evidence, default=str)
        if len(text) <= self.EVIDENCE_BYTES:
            found: Document = json.loads(text)
            return found
        return {"cut": text[: self.EVIDENCE_BYTES]}

    def _begin(self, entry: EscalationEntry) -> None:
        group = self._group(entry)
        if group is None or not self.config.get("consul"):
            entry["group"] = None
            self._escalate_alone(entry)
            return
        entry["group"] = list(group)
        if self.coordination is None:
            from watchdog_agent.escalation.coordinator import Coordinator

            self.coordination = Coordinator(self.loop, self.config, self._escalate_group)
        key = entry["key"]

        def done(episode: str, *, coordinated: bool) -> None:
            if entry["told"] and entry["episode"] == episode:
                return
            entry["told"], entry["episode"] = True, episode
            entry["group"] = list(group) if coordinated else None
            self.log("escalated", key=key, episode=episode, coordinated=coordinated)
            self._schedule_refresh()
            self.on_change()

        it = self.coordination.begin(entry, group, done)
        self.rounds[key] = it

    def _schedule_refresh(self, first_s: float | None = None) -> None:
        """Refresh the notes of open escalations before they expire."""
        if self.refreshing is None and any(
            one["told"] and one["group"] for one in self.open.values()
        ):
            wait = self.rules["note_s"] if first_s is None else first_s
            self.refreshing = self.loop.later(wait * between(0.8, 1.0), self._refresh_notes)

    def _refresh_notes(self) -> None:
        from watchdog_agent.escalation import coordinator

        self.refreshing = None
        kv = self._kv()
        for entry in self.open.values():
            if entry["told"] and entry["group"]:
                name, every_s = self.config["device_id"], self.rules["note_s"]
                note = coordinator.note_of(entry, name, every_s)

                def written(entry: EscalationEntry = entry) -> None:
                    if self._is_over(entry):  # it ended while the note was being written
                        self._leave(entry, None)

                coordinator.refresh_note(kv, self.config["slug"], entry, note, written)
        self._schedule_refresh()

    def _group(self, entry: EscalationEntry) -> tuple[str, str] | None:
        by: list[str] = self.rules["by"]
        gateway = self.config.get("gateway")
        known: Document = {
            "gateway": gateway.get("address", "") if gateway else "",
            "class": self.config.get("agent_class", ""),
            "host": os.uname().nodename if "host" in by else "",
        }
        known |= {kind: entry["evidence"].get(kind) or known.get(kind, "") for kind in by}
        values = {kind: value for kind, value in known.items() if isinstance(value, str) and value}
        return election.group_of(by, self.config.get("labels") or {}, values)

    # -- sending

    def _escalate_alone(self, entry: EscalationEntry) -> None:
        what = election.member_of(self.config["device_id"], entry)
        document, _ = election.next_document(
            None, {entry["id"]: what}, entry["at"], self.rules["window_s"]
        )
        assert document is not None

        def done(taken: bool) -> None:
            if taken and not self._is_over(entry):
                entry["told"], entry["episode"] = True, entry["id"]
                self.on_change()

        self._send(entry, document, None, "firing", done)

    def _escalate_group(
        self,
        document: GroupAlert,
        group: tuple[str, str] | None,
        entry: EscalationEntry,
        done: Callable[[bool], None],
    ) -> None:
        status = "firing" if document["rev"] == 1 else "update"
        self._send(entry, document, group, status, done, uncoordinated=group is None)

    def _send(
        self,
        entry: EscalationEntry,
        document: GroupAlert,
        group: tuple[str, str] | None,
        status: str,
        done: Callable[[bool], None],
        *,
        uncoordinated: bool = False,
    ) -> None:
        count = len(document["ids"])
        episode = document["episode"]
        many = group is not None and count > 1
        summary = (
            f"{count} devices of {group[0]} {group[1]}: {entry['key']}"
            if many and group is not None
            else f"{self.config['device_id']}: {entry['summary']}"
        )
        end = status if status == "resolved" else document["rev"]
        self._deliver(
            {
                "key": f"{episode}.{end}",
                "kind": entry["key"],
                "status": status,
                "episode": episode,
                "rev": document["rev"],
                "at": entry["at"],
                "now": round(time.time(), 3),
                "group": list(group) if many and group else None,
                "scope": list(group) if group else None,
                "count": count,
                "devices": document["members"],
                "summary": summary[:500],
                "evidence": entry["evidence"],
                "uncoordinated": uncoordinated,
            },
            done,
        )

    def _deliver(self, alert: Alert, done: Callable[[bool], None]) -> None:
        """Send to all sinks; call `done(accepted by at least one)` when all have finished."""
        left, taken = len(self.sinks), False

        def one(ok: bool) -> None:
            nonlocal left, taken
            left -= 1
            taken = taken or ok
            if not left:
                done(taken)

        for sink in self.sinks:
            sink.put(alert, one)

    # -- ending

    def clear(self, key: str) -> None:
        """The device has recovered or left. The agent of the episode's last device reports the end to the sinks."""
        entry = self.open.pop(key, None)
        if entry is None:
            return
        self._leave(entry, self.rounds.pop(key, None))
        self.on_change()

    def _is_over(self, entry: EscalationEntry) -> bool:
        return self.open.get(entry["key"]) is not entry

    def _leave(self, entry: EscalationEntry, it: ElectionRound | None) -> None:
        """Delete this agent's note, then report the end if no other device of the episode is left. Another agent may
        have escalated for this device without this agent's knowledge."""
        self.leaving += 1
        if it is not None:
            it.withdraw(lambda: self._check_episode(entry))
        elif entry["group"] is None:
            self._check_episode(entry)
        else:
            kv, slug = self._kv(), self.config["slug"]
            kv.delete(f"{election.folder_of(entry)}/{slug}", lambda _ok: self._check_episode(entry))

    def _check_episode(self, entry: EscalationEntry) -> None:
        """Report the end, unless other devices of the episode are left. This agent's note is already deleted."""

        def ended(episode: str) -> None:
            self.leaving -= 1
            if episode and not entry.get("ended"):
                entry["episode"], entry["ended"] = episode, True
                self._resolve(entry)

        if entry["group"] is None:
            ended(entry["episode"] or entry["id"])
        else:
            from watchdog_agent.escalation import coordinator

            coordinator.ended(self._kv(), entry, ended)

    def _kv(self) -> Kv:
        from watchdog_agent.consul.kv import Kv

        return Kv(self.loop, self.config, "anomalies")

    def _resolve(self, entry: EscalationEntry) -> None:
        document: GroupAlert = {
            "episode": entry["episode"],
            "rev": 0,
            "state": "told",
            "at": entry["at"],
            "ids": [entry["id"]],
            "members": [[self.config["device_id"], self.over]],
        }
        group = (entry["group"][0], entry["group"][1]) if entry["group"] else None
        self._send(entry, document, group, "resolved", lambda _ok: None)

    def depart(self, done: Callable[[], None]) -> None:
        """The device has left the registry: resolve all its alerts, and leave the election. Call `done` when the sinks
        have accepted that, after at most DEPART_S and half a second."""
        self.over = "departed"
        for key in list(self.open):
            self.clear(key)
        until = time.monotonic() + self.DEPART_S

        def poll() -> None:
            rounds = self.coordination.rounds if self.coordination is not None else ()
            busy = self.leaving or rounds or any(one.waiting for one in self.sinks)
            if busy and time.monotonic() < until:
                self.loop.later(self.POLL_S, poll)
            else:
                self.close(done)

        poll()

    def close(self, done: Callable[[], None]) -> None:
        """Leave the election, so that another agent continues at once; call `done` within half a second."""
        if self.coordination is None:
            done()
        else:
            self.coordination.close(done)

    # -- stored state and status

    def dump(self) -> list[EscalationEntry]:
        """The open escalations, to be stored as JSON."""
        return [entry.copy() for entry in self.open.values()]

    def restore(self, saved: object) -> None:
        """Continue with the open escalations of an earlier run of this agent; invalid ones are ignored."""
        for entry in saved if isinstance(saved, list) else []:
            if _is_entry(entry) and len(self.open) < self.MAX_OPEN:
                self.open[entry["key"]] = entry
                if not entry["told"]:
                    self._begin(entry)
        # The notes may be about to expire after the downtime.
        self._schedule_refresh(self.RETURN_S)

    def status(self) -> EscalationStatus:
        """The status for /status and the metrics."""
        hidden = ("id", "evidence")
        return {
            "open": [
                {name: value for name, value in one.items() if name not in hidden}
                for one in self.open.values()
            ],
            "queued": sum(len(one.waiting) for one in self.sinks),
            "sent": sum(one.sent for one in self.sinks),
            "failed": sum(one.failed for one in self.sinks),
            "dropped": sum(one.dropped for one in self.sinks),
            "last_error": next((one.last_error for one in self.sinks if one.last_error), ""),
        }


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict):
        return False
    group = entry.get("group")
    texts = all(isinstance(entry.get(one), str) for one in ("key", "id", "summary", "episode"))
    pair = group is None or (
        isinstance(group, list) and len(group) == 2 and all(isinstance(one, str) for one in group)
    )
    return (
        texts
        and pair
        and isinstance(entry.get("at"), (int, float))
        and isinstance(entry.get("evidence"), dict)
        and isinstance(entry.get("told"), bool)
    )

"""The agent's state in Consul's KV store, for hosts where no directory survives a restart.

Key ``<prefix>/agent-state/<slug>``: ``{"epoch": n, "state": {…}}``, at most 2 KiB. Written after changes, at most
once per EVERY_S, always by compare-and-set, and never over the state of a newer epoch: a replaced agent that does
not know it yet cannot overwrite the state of its successor.
"""

from __future__ import annotations

from watchdog_agent.consul.kv import Kv
from watchdog_agent.runtime.loop import between
from watchdog_agent.runtime.stdlib_light import json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from watchdog_agent.runtime.loop import Loop
    from watchdog_agent.runtime.types import (
        Config,
        Document,
        EscalationEntry,
        KvEntry,
        SavedState,
        Timer,
    )


class ConsulState:
    """Reads the state once, then writes it."""

    READ_S = 1.0
    EVERY_S = 10.0
    MAX_WAIT_S = 120.0
    MAX_BYTES = 2048
    TRIES = 3

    def __init__(self, loop: Loop, config: Config, log: Callable[..., None]) -> None:
        self.loop, self.log = loop, log
        self.kv = Kv(loop, config, "agent-state")
        self.slug: str = config["slug"]
        self.epoch: int = config["epoch"]
        self.device_id: str = config["device_id"]
        self.index: int | None = None
        """Last known ModifyIndex; None = unknown, so the key must be read before a write."""
        self.written: Mapping[str, object] = {}
        self.wanted: SavedState | None = None
        self.outdated = False
        self.busy = False
        self.failures = 0
        self.timer: Timer | None = None

    def load(self, done: Callable[[Document], None]) -> None:
        """Call `done(state)` within READ_S; {} if this or an earlier epoch has stored none."""
        waiting = True

        def once(state: Document, remark: str) -> None:
            nonlocal waiting
            if waiting:
                waiting = False
                timer[2] = None
                if remark:
                    self.log("state in Consul can't be used; starting clean", reason=remark)
                done(state)

        def listed(found: list[KvEntry] | None, reason: str) -> None:
            once(self._seen(found) if found is not None else {}, reason)

        timer = self.loop.later(
            self.READ_S, lambda: once({}, f"no answer within {self.READ_S:g} s")
        )
        self.kv.listed(self.slug, listed)

    def _seen(self, found: list[KvEntry]) -> Document:
        """Remember the index, and whether a newer epoch has written; return the state to continue from, or {}."""
        entry = next((one for one in found if one["name"] == self.slug), None)
        self.index = entry["index"] if entry is not None else 0
        value = entry["value"] if entry is not None else None
        if not isinstance(value, dict) or type(value.get("epoch")) is not int:
            return {}
        self.outdated = value["epoch"] > self.epoch
        state = value.get("state")
        # The slug contains a hash of the device ID, so another device's state here was put there on purpose.
        if self.outdated or not isinstance(state, dict) or state.get("device_id") != self.device_id:
            return {}
        self.written = state
        return state

    def save(self, state: SavedState) -> None:
        """Store this state soon, unless it is already stored."""
        self.wanted = small(state)
        if not self.outdated and not self.busy and self.timer is None and self._changed():
            self._write()

    def delete(self, then: Callable[[], None]) -> None:
        """Delete the state of a device that has left, then call back. The state of a newer epoch stays."""
        self.outdated = True  # no further writes
        self._read_and_delete(self.TRIES, then)

    def _read_and_delete(self, tries: int, then: Callable[[], None]) -> None:
        self.kv.listed(self.slug, lambda found, _reason: self._delete_read(found, tries, then))

    def _delete_read(
        self, found: list[KvEntry] | None, tries: int, then: Callable[[], None]
    ) -> None:
        entry = next((one for one in found or [] if one["name"] == self.slug), None)
        value = entry["value"] if entry is not None else None
        if entry is None or not isinstance(value, dict) or value.get("epoch", 0) > self.epoch:
            then()
            return

        def deleted(gone: bool) -> None:  # as in Consul's answer
            if gone or tries <= 1:
                then()
            else:
                # A write of this agent that was in progress came first.
                self._read_and_delete(tries - 1, then)

        self.kv.delete(self.slug, deleted, entry["index"])

    def _changed(self) -> bool:
        """Whether anything else than reason, misses and `since` has changed; those are written with the next change."""
        if self.wanted is None:
            return False
        passing = {"reason": "", "misses": 0, "since": 0}
        return {**self.wanted, **passing} != {**self.written, **passing}

    def _write(self) -> None:
        self.timer = None
        if self.outdated or not self._changed():
            self.busy = False
            return
        self.busy = True
        if self.index is None:
            self.kv.listed(self.slug, self._read)
            return
        state = self.wanted
        assert state is not None
        body = {"epoch": self.epoch, "state": state}
        if len(json.dumps(body)) > self.MAX_BYTES:
            # Only this part grows without limit. A repeated alert is better than a lost state.
            body["state"] = {name: value for name, value in state.items() if name != "escalations"}

        def written(taken: bool | None, _reason: str) -> None:
            if taken:
                self.written = state
            # The new index is unknown: read before the next write.
            self.index = None
            self._next(good=bool(taken))

        self.kv.put(self.slug, f"cas={self.index}", body, written)

    def _read(self, found: list[KvEntry] | None, _reason: str) -> None:
        if found is None:
            self._next(good=False)
            return
        written = self.written
        self._seen(found)
        self.written = written
        if self.outdated:
            self.busy = False
            self.log("state in Consul is a newer epoch's; not written", epoch=self.epoch)
            return
        self._write()

    def _next(self, *, good: bool) -> None:
        self.busy = False
        self.failures = 0 if good else self.failures + 1
        wait = min(self.MAX_WAIT_S, self.EVERY_S * 2 ** min(self.failures, 8))
        self.timer = self.loop.later(wait * between(1.0, 1.2), self._write)


def small(state: SavedState) -> SavedState:
    """Reduce a state to what is stored in Consul. Sequences are rounded up to thousands, so that a report needs no
    write; after a restart they continue above all used ones."""
    escalations: list[EscalationEntry] = [
        {**one, "evidence": {}, "summary": one["summary"][:120]}
        for one in state.get("escalations", [])
    ]
    return {
        "device_id": state["device_id"],
        "was_ready": state["was_ready"],
        "state": state["state"],
        "reason": state["reason"][:200],
        "misses": state["misses"],
        "since": state["since"],
        "sequence": (state["sequence"] // 1000 + 1) * 1000,
        "escalations": escalations,
    }

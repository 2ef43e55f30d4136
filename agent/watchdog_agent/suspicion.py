"""Probe results → what is believed of the device. Pure: no clock, no I/O.

ok → (k misses in a row of a probe) → suspect → (no probe answers, and two independent confirmations with
a missed probe between them failed too) → offline. One confirmation would do if losses were independent; a
device that stands still for some seconds after a lost packet is why there are two (bench/detection.py). A
device that answers any probe is not offline; one that never answered is suspected for ever, never called
offline: it may not be there yet (S6).
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    State = Literal["ok", "suspect", "offline"]


class Suspicion:
    """The belief about one device. `need`: misses in a row of one probe that make it suspect."""

    ROUNDS = 2
    """Confirmations that must fail in a row."""

    def __init__(self, need: int, *, was_ready: bool = False) -> None:
        self.need = need
        self.state: State = "ok"
        self.was_ready = was_ready
        self.confirmed = False
        self.reason = "no probe has answered yet"
        self.behind = ""
        """Why nothing can be said of the device itself: what stands before it is dead."""
        self._misses: dict[str, int] = {}
        self._late: set[str] = set()
        self._rounds = 0
        self._misses_then = 0

    def restore(self, state: object, reason: object) -> None:
        """Go on from what an earlier run believed, so that a restart is not taken for a recovery."""
        if self.was_ready and state in ("suspect", "offline"):
            self.confirmed = state == "offline"
            self.state = "offline" if self.confirmed else "suspect"
            self.reason = reason if isinstance(reason, str) else "as before the restart"

    @property
    def misses(self) -> int:
        """Most misses in a row of any probe."""
        return max(self._misses.values(), default=0)

    def probed(self, name: str, ok: bool, reason: str, need: int | None = None) -> bool:
        """Take one result of probe `name` (unique among the probes); true when the state changed."""
        before = self.state
        if ok:
            self._misses[name] = 0
            self._late.discard(name)
            self.was_ready = True
            self.confirmed = False
            self._rounds = self._misses_then = 0
            self.behind = ""
            if not self._late:
                self.state, self.reason = "ok", reason
            elif self.state == "offline":
                self.state = "suspect"
                self.reason = f"{self._cause()}; but {name} answers"
        else:
            self._misses[name] = self._misses.get(name, 0) + 1
            if self._misses[name] >= (need or self.need):
                self._late.add(name)
                if self.state == "ok":
                    self.state = "suspect"
                if self.state == "suspect":
                    self.reason = self.behind or f"{reason}, {self._misses[name]} times"
        return self.state != before

    def wants_confirmation(self) -> bool:
        """Whether an independent probe should be asked now: once for each missed probe."""
        silent = all(self._misses.values()) and self.misses > self._misses_then
        return self.state == "suspect" and self.was_ready and silent and bool(self._late)

    def gateway(self, alive: bool, reason: str) -> bool:  # as a probe's callback says it
        """Take whether the device's gateway answers; true when what is said of the device changed.

        While it does not, a suspected device stays suspected: nothing that fails behind a dead gateway
        confirms anything (S6). One that was confirmed before stays offline."""
        if alive or self.state != "suspect":
            was, self.behind = self.behind, ""
            if was and self.state == "suspect":
                self.reason = "its gateway answers again, the device does not yet"
            return bool(was)
        self._rounds = 0
        was, self.behind = self.behind, reason
        self.reason = reason
        return was != reason

    def confirmation(self, name: str, ok: bool, reason: str) -> bool:
        """Take the result of the independent probe; true when the state changed."""
        if not self.wants_confirmation():
            return False
        self._misses_then = self.misses
        if ok:
            self._rounds = 0
            self.reason = f"{self._cause()}; but {name} answers"
            return False
        self._rounds += 1
        if self._rounds < self.ROUNDS:
            self.reason = f"{self._cause()}; {name}: {reason}, to be asked again"
            return False
        self.confirmed = True
        self.state = "offline"
        self.reason = f"{self._cause()}; {name}: {reason}"
        return True

    def doubt(self, *, confirmed_too: bool) -> bool:
        """Count no round that failed so far, and ask again from the next missed probe on; true when the state
        changed. Of a device that is offline already that is done only with `confirmed_too`."""
        if self.state == "ok" or (self.state == "offline" and not confirmed_too):
            return False
        self._rounds, self._misses_then = 0, self.misses
        if self.state == "suspect":
            return False
        self.state, self.confirmed = "suspect", False
        self.reason = f"{self._cause()}; found while the control plane was not heard either"
        return True

    def _cause(self) -> str:
        return self.reason.partition("; ")[0]

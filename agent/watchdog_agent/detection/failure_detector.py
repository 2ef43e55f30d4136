"""Determines the state of the device from probe results. Pure: no clock, no I/O.

- **ok**: every probe succeeds, or has fewer consecutive misses than its threshold (`need`).
- **suspect**: a probe missed `need` times in a row (or has missed and none has succeeded since the start), and
  confirmation is in progress. Transient: each round of misses runs the independent probe once.
- **offline**: no probe succeeds, and two independent confirmations failed, with a missed probe between them.
  If losses were independent, one would be enough; the second one covers a device that stalls for a few seconds
  after a lost packet (bench/detection.py). Only a device that has answered before can be offline (S6).
- **degraded**: a confirmation or another probe succeeds while a probe misses; or a warning threshold is
  exceeded, which never counts as a miss. An offline device becomes degraded only by the result of a probe that
  started after something answered (`to_ask`): earlier misses do not describe a device that is back.
- **unable**: a probe could not be run `need` times in a row, or two confirmations could not be run. A probe that
  could not be run counts neither as a miss nor as a success, and not as a confirmation.

A device that has answered before leaves `suspect` after at most MAX_ROUNDS rounds in which all its probes missed;
each round probes its gateway or runs the confirmation. A device that has never answered stays suspect while its
confirmations fail.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    from watchdog_agent.runtime.types import Outcome

    State = Literal["ok", "suspect", "degraded", "offline", "unable"]


BEFORE = ""
"""Placeholder probe name for the result of an earlier run or of a predecessor."""


class FailureDetector:
    """The state of one device. `need`: consecutive misses of one probe that make it suspect."""

    ROUNDS = 2
    """Consecutive confirmations that must fail, or be impossible to run."""
    MAX_ROUNDS = 4
    """Maximum number of missed rounds in `suspect`: fail, dead gateway, fail, dead gateway."""

    def __init__(self, need: int, *, was_ready: bool = False) -> None:
        self.need = need
        self.state: State = "ok"
        self.was_ready = was_ready
        self.answered = False
        """Whether a probe has succeeded since the start."""
        self.reason = "no probe has answered yet"
        self.behind = ""
        """Why the state of the device is unknown: its gateway does not answer. Empty while the gateway answers."""
        self._last_reason = self.reason
        self._was_ok = False
        """Whether an earlier run found the device healthy, and no probe has run since."""
        self._misses: dict[str, int] = {}
        self._unable: dict[str, int] = {}
        self._late: dict[str, str] = {}
        """Probe → reason, for probes at their miss threshold; the most recently changed one is last."""
        self.to_ask: set[str] = set()
        """Probes that missed before an offline device answered again, and have not been run since."""
        self.returns = 0
        """Number of such returns. The result of a probe that started at a lower number is outdated."""
        self._partial = False
        """The device was degraded before: one miss of a probe that has not succeeded yet keeps it degraded."""
        self._blind: dict[str, str] = {}
        """Probe → reason, for probes that could not be run `need` times in a row."""
        self._warned: dict[str, str] = {}
        self._well: set[str] = set()
        """Probes that have succeeded since the start."""
        self._alive = ""
        """The probe or confirmation that succeeded while another probe misses."""
        self._found = ""
        """Description of the last confirmation's result."""
        self._offline = False
        """Two confirmations have failed, and nothing has succeeded since."""
        self._inherited = False
        """`_offline` was taken over from an earlier run or a predecessor."""
        self._rounds = self._unasked = 0
        self._misses_then = 0

    @property
    def misses(self) -> int:
        """Highest number of consecutive misses of any probe."""
        return max(self._misses.values(), default=0)

    @property
    def confirmed(self) -> bool:
        """Whether the device is offline, with all required confirmations."""
        return self.state == "offline"

    @property
    def well(self) -> bool:
        """Whether the device is healthy, as found now, or by an earlier run with no probe since."""
        return self.state == "ok" and (self.answered or self._was_ok)

    @property
    def cause(self) -> str:
        """The cause of the state. Unlike `reason`, it does not change with each measured value."""
        if self.state == "ok":
            return ""
        warned = self.state == "degraded" and not self._late
        return "; ".join(self._warned) if warned else self.reason

    # -- restored state

    def restore(self, state: object, reason: object, misses: object) -> None:
        """Continue with the state of an earlier run or of a predecessor, so that a restart does not look like a
        recovery. It counts as a probe of its own, BEFORE, that misses until any probe succeeds."""
        if not self.was_ready:
            return
        self._was_ok = state == "ok"
        if state not in ("suspect", "degraded", "offline"):
            return
        text = reason if isinstance(reason, str) else "as before the restart"
        cause, _, found = text.partition("; ")
        count = misses if type(misses) is int and 0 <= misses < 1 << 31 else self.need
        if state == "degraded" and not count:
            self._was_ok, self._warned = True, {BEFORE: text}
            self._update()
            return
        self._misses[BEFORE] = max(1, count, self.misses)
        self._late = {BEFORE: cause} | self._late
        self._partial = state == "degraded"
        self._misses_then = self.misses
        self._found = found
        self._offline = self._inherited = state == "offline"
        if state == "degraded":
            # Remove the words added by `_describe`, so that it produces the same reason again.
            self._alive = found.removeprefix("but ").removesuffix(" answers") or "another probe"
        self._update()

    def adopt(self, state: str, reason: str, misses: int) -> bool:
        """Take over the condition (offline or degraded) that the control plane has for the device; return whether it
        was taken over. Not after a probe or confirmation has succeeded: then this agent's own results are newer."""
        if self.answered or self._alive:
            return False
        self.was_ready = True
        self._rounds = self._unasked = 0
        self.restore(state, reason, misses)
        return True

    # -- results

    def probed(
        self,
        name: str,
        outcome: Outcome,
        reason: str,
        need: int | None = None,
        warning: str = "",
        asked_at: int | None = None,
    ) -> bool:
        """Record one result of probe `name` (unique among the probes); return whether the state changed. `warning`:
        description of the exceeded threshold. `asked_at`: value of `returns` when the probe started; None = current."""
        if outcome:
            self._answered(name, reason, warning)
        elif outcome is None:
            self._unable[name] = self._unable.get(name, 0) + 1
            self._first(reason)
            if self._unable[name] >= (need or self.need):
                self._blind[name] = reason
                if self._late.keys() <= {*self._blind, BEFORE}:
                    # The device may return unnoticed meanwhile, so confirmation starts over.
                    self._offline = self._inherited = False
                    self._rounds, self._found = 0, ""
        else:
            self._missed(name, reason, need or self.need)
            if asked_at in (None, self.returns):
                self._missed_again(name)
        return self._update()

    def _missed(self, name: str, reason: str, need: int) -> None:
        self._unable.pop(name, None)
        self._blind.pop(name, None)
        self._first(reason)
        if BEFORE in self._misses:
            self._misses[BEFORE] += 1
        count = self._misses[name] = self._misses.get(name, 0) + 1
        at_once = self._partial and name not in self._well
        if name not in self._late and count < need and not at_once:
            return
        if self._late.get(name) != reason:
            self._late.pop(name, None)
            self._late[name] = reason

    def _missed_again(self, name: str) -> None:
        """A probe that started after something answered has missed too: the device is only partly back."""
        self.to_ask.discard(name)
        if name in self._late:
            self._late[name] = self._late.pop(name)
        if name in self._late or BEFORE in self._late:
            self.to_ask.clear()

    def _returned(self) -> None:
        """An offline device answers again: only probes that start from now on determine its state."""
        self._offline = self._inherited = False
        self.returns += 1
        self.to_ask = {name for name, count in self._misses.items() if count and name != BEFORE}
        self._found = "something of it answers, and the probe is asked again"

    def _first(self, reason: str) -> None:
        if not self.answered and not self._was_ok:
            self._last_reason = reason

    def _answered(self, name: str, reason: str, warning: str) -> None:
        self._misses[name] = 0
        self._well.add(name)
        self.to_ask.discard(name)
        self._unable.pop(name, None)
        self._blind.pop(name, None)
        for one in (name, BEFORE):
            self._late.pop(one, None)
            self._warned.pop(one, None)
        self._misses.pop(BEFORE, None)
        if warning:
            self._warned[name] = warning
        self.was_ready = self.answered = True
        self._rounds = self._unasked = self._misses_then = 0
        self.behind = self._found = ""
        if self._offline and self._late:
            self._returned()
        self._offline = self._inherited = False
        self._alive = name.partition(":")[2] or name if self._late else ""
        self._last_reason = reason

    def wants_confirmation(self) -> bool:
        """Whether to run the independent probe now: once per missed round, while no probe succeeds."""
        silent = all(self._misses.values()) and self.misses > self._misses_then
        return bool(self._late) and silent

    def confirmation(self, name: str, outcome: Outcome, reason: str) -> bool:
        """Record the outcome of the independent probe; return whether the state changed."""
        if not self.wants_confirmation():
            return False
        self._misses_then = self.misses
        if outcome:
            self._alive, self._found = name, ""
            if self._offline:
                self._returned()
            self._rounds = self._unasked = 0
        elif outcome is None:
            self._not_asked(f"unable to confirm: {name}: {reason}")
        else:
            self._failed(f"{name}: {reason}")
        return self._update()

    def _failed(self, found: str) -> None:
        self._rounds += 1
        if self._rounds < self.ROUNDS:
            if not self._offline:
                self._found = f"{found}, to be asked again"
            return
        self._alive = ""
        self.to_ask.clear()
        if not self.was_ready:
            self._found = f"{found}; it has never answered"
        elif not self._offline or self._inherited:
            self._found, self._offline, self._inherited = found, True, False

    def _not_asked(self, why: str) -> None:
        self._unasked += 1
        if not self._offline:
            self._found = why
            if self._unasked >= self.ROUNDS:
                self._alive = ""  # the success is too old
                self.to_ask.clear()

    def gateway(self, outcome: Outcome, reason: str) -> bool:
        """Record whether the device's gateway answers; return whether the state or reason changed.

        While the gateway does not answer, failures behind it confirm nothing (S6). A device that was offline
        before stays offline."""
        if outcome or self._offline or not self._late:
            was, self.behind = self.behind, ""
            if was and self._late:
                self._unasked = min(self._unasked, self.ROUNDS - 1)
                self._found = "its gateway answers again, the device does not yet"
            self._update()
            return bool(was)
        before = self.reason
        self._rounds = 0
        if outcome is None:
            self.behind = ""
            self._not_asked(f"unable to confirm: {reason}")
        else:
            self.behind = reason
            self._not_asked("")
        return self._update() or self.reason != before

    def doubt(self, *, confirmed_too: bool) -> bool:
        """Discard the failed rounds and confirm again from the next missed probe on; return whether the state
        changed. For a device that is already offline, only with `confirmed_too`."""
        if not self._late or (self._offline and not confirmed_too):
            return False
        self._rounds, self._misses_then = 0, self.misses
        if self._offline:
            self._offline = self._inherited = False
            self._found = "found while the control plane was not heard either"
        return self._update()

    # -- evaluation

    def _update(self) -> bool:
        before, self.state = self.state, self._judged()
        self.reason = self._describe()
        return self.state != before

    def _judged(self) -> State:
        if self._blind and self._late.keys() <= {*self._blind, BEFORE}:
            return "unable"
        if self._offline:
            return "offline"
        if self._late:
            return self._judged_late()
        if not self.answered and not self._was_ok and (self._misses or self._unable):
            return "suspect"
        return "degraded" if self._warned else "ok"

    def _judged_late(self) -> State:
        """The state while at least one probe misses."""
        if self._alive:
            return "suspect" if self.to_ask else "degraded"
        return "unable" if self._blind or self._unasked >= self.ROUNDS else "suspect"

    def _describe(self) -> str:
        if self.state == "ok":
            return self._last_reason
        if self.behind and self.state != "offline":
            return self.behind
        if self._blind and self.state == "unable":
            return next(iter(self._blind.values()))
        if not self._late:
            return (
                "; ".join(dict.fromkeys(self._warned.values()))
                if self.state == "degraded"
                else self._last_reason
            )
        # Without the number of misses, which is in the report: it would be outdated after the next probe.
        cause = next(reversed(self._late.values()))
        found = f"but {self._alive} answers" if self.state == "degraded" else self._found
        return f"{cause}; {found}" if found else cause

"""Decides when and how to repair a device that does not answer. Pure: no clock, no I/O; times are in seconds of
one clock that the caller reads.

Steps are ordered. The first eligible one is taken: its precondition holds, it has tries left in this
episode, and budget left in its window. A step in its cool-down is waited for, so that a harsh step is
never taken because a mild one is cooling down. A step has helped only if a probe succeeds after it, within its
`verify_s`; if no probe could be run in that time, the effect is unknown. While the device's gateway is dead, only
steps meant for that are taken. The ladder is exhausted when a device is offline or degraded and no step is left. For
a degraded device, only steps meant for that are taken. While this host has no route to the device, only steps for
its own interface are taken.

An episode lasts from the first doubt until the device answers again.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container
    from typing import Any, Final

    from watchdog_agent.runtime.types import Attempt, Decision, Document, Step

MAX_ATTEMPTS: Final = 32
"""Maximum number of attempts in the history; budgets are recorded separately."""

BEHIND: Final = "the gateway does not answer; repairing the device would not help"
REST: Final = "rest"
"""The device answers."""
TAKE: Final = "take"
WAIT: Final = "wait"
"""Wait until the given time, or until something changes."""
EXHAUSTED: Final = "exhausted"

RUNNING: Final = "running"
VERIFYING: Final = "verifying"
RECOVERED: Final = "recovered"
NO_HELP: Final = "no help"
UNABLE: Final = "unable"
"""No probe could be run to check whether it has helped."""
FAILED: Final = "failed"
INTERRUPTED: Final = "interrupted"
DRY_RUN: Final = "dry run"
OUTCOMES: Final = (RUNNING, VERIFYING, RECOVERED, NO_HELP, UNABLE, FAILED, INTERRUPTED, DRY_RUN)


class Ladder:
    """The ladder of one device. `steps` are checked steps of the configuration (`config.repairs`)."""

    def __init__(self, steps: list[Step]) -> None:
        self.steps = steps
        self.episode = 0
        self.open = False
        """Whether an episode is in progress."""
        self.escalated = False
        """Whether this episode was escalated."""
        self.attempts: list[Attempt] = []
        self.count = 0
        """Number of attempts so far, which is the number of the last one."""
        self._times: dict[str, list[float]] = {step["id"]: [] for step in steps}

    # -- decisions

    def next(
        self, state: str, failing: Container[str], now: float, *, behind: bool = False
    ) -> Decision:
        """(action, step or None, when to decide again or None, reason).

        `state`: the device's state, or "no route" if the agent has no route to probe it; `failing`: names of the probes
        that miss; `behind`: its gateway does not answer."""
        if state == "no route" and not any(step["kind"] == "interface" for step in self.steps):
            state = "unable"
        if state == "ok" or (state == "unable" and not self.open):
            return REST, None, None, "the device answers" if state == "ok" else "nothing is known"
        if not self.open:
            self.open, self.escalated = True, False
            self.episode += 1
        if (current := self.current) is not None and (wait := _wait(current, now)) is not None:
            return wait
        if state == "unable":
            return WAIT, None, None, "the agent is unable to ask the device"
        return self._choose(state, failing, now, behind)

    def _choose(
        self,
        state: str,
        failing: Container[str],
        now: float,
        behind: bool,  # as its gateway answers
    ) -> Decision:
        unfit = held = False
        for step in self.steps:
            if self._tried(step) >= step["tries"] or self._spent(step, now):
                continue
            if not _fits(step, state, failing):
                unfit = True
                continue
            if behind and not step["even_behind_gateway"]:
                held = True
                continue
            times = self._times[step["id"]]
            ready = times[-1] + step["cooldown_s"] if times else now
            if now < ready:
                return WAIT, None, ready, f"{step['name']} cools down"
            return TAKE, step, None, ""
        if state in ("offline", "degraded"):
            why = "its gateway does not answer" if held else "nothing is left to try"
            return EXHAUSTED, None, None, why
        if held:
            return WAIT, None, None, BEHIND
        return WAIT, None, None, "no step fits yet" if unfit else "no step is left"

    def _tried(self, step: Step) -> int:
        return sum(a["id"] == step["id"] and a["episode"] == self.episode for a in self.attempts)

    def _spent(self, step: Step, now: float) -> bool:
        times = self._times[step["id"]]
        return bool(sum(now - at < step["window_s"] for at in times) >= step["budget"])

    @property
    def current(self) -> Attempt | None:
        """The attempt that is running or being verified."""
        last = self.attempts[-1] if self.attempts else None
        return last if last is not None and last["outcome"] in (RUNNING, VERIFYING) else None

    @property
    def exhausted(self) -> bool:
        """Whether the ladder has escalated this episode."""
        return self.open and self.escalated

    # -- events

    def begin_attempt(self, step: Step, now: float, *, dry: bool = False) -> Attempt:
        """Begin an attempt of this step. The caller must store it before taking the step."""
        assert self.current is None
        self.count += 1
        attempt: Attempt = {
            "number": self.count,
            "id": step["id"],
            "name": step["name"],
            "episode": self.episode,
            "at": now,
            "ended": now,
            "verify_s": step["verify_s"],
            "outcome": DRY_RUN if dry else RUNNING,
            "reason": "",
        }
        times = self._times[step["id"]]
        times.append(now)
        del times[: -step["budget"]]
        self.attempts.append(attempt)
        self._forget()
        return attempt

    def discard_attempt(self, now: float) -> None:
        """Remove the last attempt, because it could not be stored and the step was not taken."""
        attempt = self.attempts.pop()
        self.count -= 1
        times = self._times[attempt["id"]]
        assert times[-1] <= now
        times.pop()

    def ended(self, ok: bool, reason: str, now: float) -> None:
        """The running step has ended; on success, verification follows."""
        current = self.current
        assert current is not None
        current["ended"] = now
        current["outcome"] = VERIFYING if ok else FAILED
        current["reason"] = reason[:200]

    def interrupted(self, reason: str, now: float) -> None:
        """The running step was abandoned. It counts, and is not repeated in this episode."""
        current = self.current
        if current is not None and current["outcome"] == RUNNING:
            current["ended"], current["outcome"] = now, INTERRUPTED
            current["reason"] = reason[:200]

    def missed(self, *, asked: bool) -> None:
        """A probe missed, or could not be run, while a step is being verified."""
        current = self.current
        if current is not None and current["outcome"] == VERIFYING:
            current["asked"] = asked or current.get("asked", False)

    def answered(self, now: float) -> bool:
        """The device is healthy, and a probe has just succeeded; return whether that ends the episode. While a step is
        running it does not: the step may interrupt the device again."""
        current = self.current
        if current is not None:
            if current["outcome"] == RUNNING:
                return False
            current["outcome"] = RECOVERED
            current["reason"] = f"answered after {now - current['ended']:.1f} s"
        was_open, self.open = self.open, False
        return was_open

    def _forget(self) -> None:
        """Limit the history, except for the current episode, whose tries are counted from it."""
        while len(self.attempts) > MAX_ATTEMPTS:
            old = next(
                (n for n, a in enumerate(self.attempts) if a["episode"] != self.episode), None
            )
            if old is None:
                break  # limited as well, to steps × tries
            del self.attempts[old]

    # -- stored state

    def dump(self, now: float) -> Document:
        """For the state file; ages instead of times, because the clock does not survive the process."""
        return {
            "count": self.count,
            "episode": self.episode,
            "open": self.open,
            "escalated": self.escalated,
            "attempts": [
                {**a, "at": round(now - a["at"], 3), "ended": round(now - a["ended"], 3)}
                for a in self.attempts
            ],
            "times": {
                name: [round(now - at, 3) for at in times]
                for name, times in self._times.items()
                if times
            },
        }

    def restore(self, saved: Any, aged_s: float, now: float) -> None:
        """Continue from what an earlier run stored `aged_s` seconds ago. Raises ValueError, KeyError or TypeError for
        invalid data; then this ladder must not be used."""
        since = now - max(0.0, aged_s)
        self.episode = _whole(saved["episode"])
        self.count = _whole(saved["count"])
        self.open = saved["open"] is True
        self.escalated = saved["escalated"] is True
        for one in saved["attempts"]:
            attempt: Attempt = {
                "number": _whole(one["number"]),
                "id": str(one["id"]),
                "name": str(one["name"]),
                "episode": _whole(one["episode"]),
                "at": since - float(one["at"]),
                "ended": since - float(one["ended"]),
                "verify_s": float(one["verify_s"]),
                "outcome": one["outcome"],
                "reason": str(one["reason"]),
            }
            if attempt["outcome"] not in OUTCOMES:
                raise ValueError("outcome")
            self.attempts.append(attempt)
        for step in self.steps:
            ages = saved["times"].get(step["id"], [])
            self._times[step["id"]] = [since - float(age) for age in ages][-step["budget"] :]
        # The earlier agent process ended during its last attempt.
        self.interrupted("the agent ended in the middle of it", now)

    def attempts_json(self, now: float, most: int = MAX_ATTEMPTS) -> list[Document]:
        """The last attempts, for /status or a report."""
        return [
            {
                "number": a["number"],
                "step": a["name"],
                "outcome": a["outcome"],
                "reason": a["reason"],
                "age_s": round(now - a["at"], 1),
            }
            for a in self.attempts[-most:]
        ]


def _wait(current: Attempt, now: float) -> Decision | None:
    """What to wait for while this attempt runs or is verified. None = verification ended without success, which is
    recorded."""
    if current["outcome"] == RUNNING:
        return WAIT, None, None, f"{current['name']} is under way"
    until = current["ended"] + current["verify_s"]
    if now < until:
        return WAIT, None, until, f"whether {current['name']} has helped"
    blind = current.pop("asked", None) is False
    current["outcome"] = UNABLE if blind else NO_HELP
    verb = "could be asked" if blind else "answered"
    current["reason"] = f"no probe {verb} within {current['verify_s']:g} s"
    return None


def _fits(step: Step, state: str, failing: Container[str]) -> bool:
    if state == "no route":
        return bool(step["kind"] == "interface" and step["when"] == "suspect")
    if state == "degraded" or step["when"] == "degraded":
        if step["when"] != state:
            return False
    elif step["when"] == "offline" and state != "offline":
        return False
    return not step["probe"] or step["probe"] in failing


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError("not a whole number")
    return value

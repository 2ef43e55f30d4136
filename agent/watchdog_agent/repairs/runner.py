"""Runs the repair ladder: `ladder` decides the next step, `authority` whether this agent may take it. The runner stores
the attempt, takes the step, and watches the probes for its effect. Loaded only if the configuration has repairs.

Before a step, the attempt and its undo data are stored. A run that finds an unfinished attempt counts it as
interrupted, does not repeat it in this episode, and brings up an interface that was left down.
"""

from __future__ import annotations

import time

from watchdog_agent.repairs import escalation, kinds, ladder
from watchdog_agent.repairs.authority import ASK, ActAuthority
from watchdog_agent.runtime.http import reason_of
from watchdog_agent.runtime.loop import between

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Final

    from watchdog_agent.repairs.host import RepairHost
    from watchdog_agent.runtime.status_types import RepairStatus
    from watchdog_agent.runtime.types import Attempt, Decision, Document, Outcome, Step, Timer, Undo
    from watchdog_agent.wire import RepairReport

STOP_S: Final = 0.8
"""Time limit of a running step after a signal, in seconds."""
AGAIN_S: Final = 5.0
"""Retry interval for storing or undoing a step, in seconds."""
UNDO_TRIES: Final = 12


class RepairRunner:
    """The repairs of one agent."""

    def __init__(self, agent: RepairHost, saved: Any) -> None:
        self.agent = agent
        config = agent.config
        policy = config["repair_policy"]
        self.dry_run: bool = policy["dry_run"]
        self.ladder = ladder.Ladder(config["repairs"])
        self.authority = ActAuthority(
            policy["accepted_beats"] * config["beat_s"], policy["alone_s"]
        )
        self.running: Any = None
        self.undo: Undo | None = None
        """Undo data of the running step, or of one that an earlier run left behind."""
        self.outcomes = dict.fromkeys(ladder.OUTCOMES[2:], 0)
        self.blocked = ""
        """Why no step may be taken now."""
        self.waits = ""
        """What the ladder waits for, if it is not one of its own steps."""
        self.then: Callable[[], None] | None = None
        self.asking = False
        self._left = UNDO_TRIES
        self._timer: Timer | None = None
        self._limit: Timer | None = None
        if saved is not None:
            self._restore(saved)
        self.escalation = escalation.LadderEscalation(agent, self.ladder, self.authority)

    def _restore(self, saved: Any) -> None:
        """Continue from an earlier run, or else start clean; an interface left down is brought up in both cases."""
        config, now = self.agent.config, time.monotonic()
        try:
            undo: Undo | None = saved["undo"]
            self.undo = undo if isinstance(undo, dict) else None
            aged_s = max(0.0, time.time() - float(saved["at"]))
            fresh = ladder.Ladder(config["repairs"])
            fresh.restore(saved["ladder"], aged_s, now)
            self.authority.restore(
                saved["standing"], config["epoch"], self.agent.instance, now - aged_s
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self.agent.log("kept repairs can't be used; starting clean", reason=str(error))
            return
        self.ladder = fresh
        last = fresh.attempts[-1] if fresh.attempts else None
        if last is not None and last["outcome"] == ladder.INTERRUPTED and self.undo is not None:
            self.agent.log("a repair was interrupted", step=last["name"])

    def start(self) -> None:
        """Start: the loop is about to run. First undo what was left behind."""
        if self.undo is not None:
            self._undo_again()

    def _undo_again(self) -> None:
        if self.undo is None or self.running is not None:
            return
        try:
            kinds.undo(self.undo)
        except (OSError, KeyError, TypeError, ValueError) as error:
            again = isinstance(error, OSError)
            text = reason_of(error) if isinstance(error, OSError) else type(error).__name__
            self.agent.log("an interrupted repair can't be undone", reason=text, again=again)
            self._left -= 1
            if again and self._left > 0:
                self.agent.loop.later(AGAIN_S * between(0.8, 1.2), self._undo_again)
                return
            # An undo that can never succeed, or that was not stored by this agent, must not block the other steps.
        else:
            self.agent.log("an interrupted repair is undone", of=self.undo["kind"])
        self.undo, self._left = None, UNDO_TRIES
        self.agent.save()
        self.tick()

    # -- events

    def report_answered(self, status: int | None, held: bool) -> None:
        """Handle a report's status; None = no answer. `held`: the answer forbids repairs."""
        self.authority.report_answered(status, time.monotonic(), held=held)
        if self.blocked:
            self.tick()

    def probed(self, outcome: Outcome) -> None:
        """A probe has ended, and the state of the device includes its result."""
        if not outcome:
            self.ladder.missed(asked=outcome is False)
        if outcome and self.agent.prober.detector.state == "ok":
            current = self.ladder.current
            if self.ladder.answered(time.monotonic()):
                self._recovered(current)
        self.tick()

    def _recovered(self, attempt: Attempt | None) -> None:
        if attempt is not None:
            self._count(attempt)
        self.escalation.recovered()
        self.agent.save()
        self.agent.send_report()

    # -- actions

    def tick(self) -> None:
        """Take the next action, if there is one."""
        agent = self.agent
        if self._timer is not None:
            self._timer[2] = None
            self._timer = None
        busy = self.running is not None or self.undo is not None
        if agent.exit_code is not None or busy or not agent.round_done():
            return
        before = self.ladder.current
        what, step, at, why = self._next()
        if before is not None and before["outcome"] in (ladder.NO_HELP, ladder.UNABLE):
            self._count(before)
            agent.save()
            agent.send_report()
        if what != ladder.TAKE:
            self.blocked = ""
        self.waits = why if why == ladder.BEHIND else ""
        if step is not None:
            self._check_gateway(step)
        elif what == ladder.EXHAUSTED:
            self.escalation.exhausted(why)
        elif at is not None:
            self._timer = agent.loop.later(max(0.01, at - time.monotonic()), self.tick)

    def _next(self) -> Decision:
        detector = self.agent.prober.detector
        failing = {
            name.partition(":")[2]
            for name, last in self.agent.prober.results.items()
            if last["outcome"] == "miss" or "warning" in last
        }
        # A device that has never answered may not exist yet: there is nothing to repair (S6).
        state: str = detector.state if detector.was_ready else "ok"
        if state == "unable" and detector.behind:
            state = "suspect"  # there are steps for a dead gateway
        elif state == "unable" and self.agent.prober.no_route:
            state = "no route"
        gateway = self.agent.prober.gateway
        behind = gateway is not None and not gateway.answers and gateway.fresh()
        return self.ladder.next(state, failing, time.monotonic(), behind=behind)

    def _check_gateway(self, step: Step) -> None:
        """Probe the gateway before a step: a device behind a dead gateway may be healthy."""
        gateway = self.agent.prober.gateway
        if gateway is None or step["even_behind_gateway"] or gateway.fresh():
            self._check_authority(step)
        elif not self.asking:
            self.asking = True
            gateway.probe(self._gateway_probed)

    def _gateway_probed(self, outcome: Outcome) -> None:
        self.asking = False
        self.agent.prober.behind(outcome)
        self.tick()

    def _check_authority(self, step: Step) -> None:
        agent = self.agent
        why = self.authority.why_not(time.monotonic())
        if not agent.folder:
            why = "there is no folder to keep it in before it is taken"
        if not why:
            self.blocked = ""
            self._run_step(step)
            return
        if why != self.blocked:
            agent.log("no repair", step=step["name"], reason=why)
            if why == ASK:
                agent.send_report()
        self.blocked = why
        self.escalation.blocked(why)

    def _run_step(self, step: Step) -> None:
        now, dry = time.monotonic(), self.dry_run or step["dry_run"]
        attempt = self.ladder.begin_attempt(step, now, dry=dry)
        try:
            if step["kind"] == "interface" and not dry:
                from watchdog_agent.repairs import interface

                self.undo = interface.prepare(step)
        except OSError as error:
            self._start_failed(step, reason_of(error))
            return
        if not self.agent.save():
            self.ladder.discard_attempt(now)
            self.undo = None
            self._timer = self.agent.loop.later(AGAIN_S * between(0.8, 1.2), self.tick)
            return
        kinds.reached("kept")
        self.agent.log("would repair" if dry else "repair", step=step["name"])
        if dry:
            self._count(attempt)
            self.agent.send_report()
            self.agent.loop.later(0, self.tick)
            return
        self._begin(step)
        self.agent.send_report()

    def _begin(self, step: Step) -> None:
        config = self.agent.config
        device = {
            "device_id": config["device_id"],
            "slug": config["slug"],
            "address": config["address"],
        }
        attempt = self.ladder.current

        def ended(ok: bool, reason: str, _warning: str = "", /) -> None:
            if self.running is not None and self.ladder.current is attempt:
                self._ended(ok, reason)

        limit = step["timeout_s"]
        self._limit = self.agent.loop.later(limit, lambda: self._too_long(limit))
        try:
            self.running = kinds.module_of(step["kind"]).start(
                self.agent.loop, step, self.undo or device, ended
            )
        except Exception as error:
            # A step that cannot be started, for whatever reason, is a failed step and must not crash the agent.
            text = reason_of(error) if isinstance(error, OSError) else str(error)
            self._start_failed(step, text)
            return
        kinds.reached("taken")

    def _start_failed(self, step: Step, reason: str) -> None:
        self.running = object()
        self.undo = None
        self._ended(False, f"{step['kind']}: {reason}")

    def _too_long(self, limit_s: float) -> None:
        if self.running is not None:
            self._abandon()
            self._ended(False, f"took longer than {limit_s:g} s")

    def _abandon(self) -> None:
        try:
            self.running.cancel()
            self.undo = None
        except OSError as error:
            # The undo data is still stored: `_undo_again` or the next start retries it.
            self.agent.log("a repair can't be undone", reason=reason_of(error))

    def _ended(self, ok: bool, reason: str) -> None:
        kinds.reached("ended")
        if ok or getattr(self.running, "clean", True):
            self.undo = None
        self.running = None
        if self._limit is not None:
            self._limit[2] = None
            self._limit = None
        attempt = self.ladder.current
        assert attempt is not None
        if self.then is not None and not ok:
            self.ladder.interrupted(reason, time.monotonic())
        else:
            self.ladder.ended(ok, reason, time.monotonic())
        self._count(attempt)
        self.agent.log("repair ended", step=attempt["name"], ok=ok, reason=reason)
        self.agent.save()
        kinds.reached("remembered")
        if self.then is not None:
            self._closed()
            return
        self.agent.send_report()
        self.agent.loop.later(0, self._undo_again if self.undo is not None else self.tick)

    def _count(self, attempt: Attempt) -> None:
        if attempt["outcome"] in self.outcomes:
            self.outcomes[attempt["outcome"]] += 1

    # -- shutdown

    def close(self, then: Callable[[], None]) -> None:
        """Finish or undo the running step, and call back within STOP_S."""
        if self.running is None:
            then()
            return
        self.then = then
        self.agent.loop.later(STOP_S, self._stop)
        self.running.finish_soon()

    def _stop(self) -> None:
        if self.running is not None:
            self._abandon()
            self._ended(False, "the agent was stopped in the middle of it")

    def _closed(self) -> None:
        then, self.then = self.then, None
        if then is not None:
            then()

    def abandon(self) -> None:
        """The loop has stopped: undo what can be undone in one call."""
        if self.running is not None:
            self._abandon()
            self.running = None
            self.ladder.interrupted("the agent ended in the middle of it", time.monotonic())
            self.agent.save()

    # -- status and stored state

    def active(self) -> str:
        """The current repair, in words; "" = none."""
        current = self.ladder.current
        if current is None:
            return ""
        if current["outcome"] == ladder.VERIFYING:
            return f"repairing: {current['name']} was done; waiting for the device to answer"
        return f"repairing: {current['name']}"

    def report(self) -> RepairReport:
        """The repairs' part of a report."""
        now = time.monotonic()
        return {
            "active": self.active(),
            "exhausted": self.ladder.exhausted,
            "dry_run": self.dry_run,
            "attempts": self.ladder.attempts_json(now, escalation.MAX_REPORTED),
        }

    def status(self) -> RepairStatus:
        """The repairs' part of /status."""
        now = time.monotonic()
        return {
            "active": self.active(),
            "exhausted": self.ladder.exhausted,
            "dry_run": self.dry_run,
            "blocked": self.blocked or self.waits or self.authority.why_not(now),
            "steps": [step["name"] for step in self.ladder.steps],
            "outcomes": self.outcomes,
            "attempts": self.ladder.attempts_json(now),
        }

    def dump(self) -> Document:
        """The repairs' part of the state file."""
        now = time.monotonic()
        config = self.agent.config
        return {
            "at": time.time(),
            "undo": self.undo,
            "ladder": self.ladder.dump(now),
            "standing": self.authority.dump(config["epoch"], self.agent.instance, now),
        }

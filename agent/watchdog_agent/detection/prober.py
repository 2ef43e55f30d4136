"""Runs the probes of the device and its gateway, and the independent confirmations.

`detection.failure_detector` determines the state from the results; `agent` acts on it.
"""

from __future__ import annotations

import time

from watchdog_agent.config import probes
from watchdog_agent.detection import probe_interval
from watchdog_agent.detection.failure_detector import FailureDetector
from watchdog_agent.detection.probe_stats import Stats
from watchdog_agent.probes import builtin
from watchdog_agent.runtime import outcome as outcomes
from watchdog_agent.runtime import parsing
from watchdog_agent.runtime.loop import between
from watchdog_agent.runtime.stdlib_light import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from watchdog_agent.detection.host import ProbeHost
    from watchdog_agent.detection.thresholds import Thresholds
    from watchdog_agent.probes.gateway import Gateway
    from watchdog_agent.runtime.status_types import ProbeResult, ProberStatus
    from watchdog_agent.runtime.types import DetectorState, Document, Outcome, Probe, Timer


MAX_HISTORY = 32
"""Maximum number of state changes in /status."""
MAX_AGE_S = 10 * 365 * 86400.0
"""Maximum age of a state in seconds; older ones are clamped to it."""


_WEIGHT = (True, False, None)
"""Priority of confirmation outcomes. One success is enough to doubt the probe instead of the device; one that could
not be run counts only if no other was run."""


class Prober:
    """Probes the device of `agent`, and notifies the agent of changes."""

    def __init__(self, agent: ProbeHost) -> None:
        self.agent = agent
        self.loop, self.config = agent.loop, agent.config
        self.results: dict[str, ProbeResult] = {}
        self.stats: dict[str, Stats] = {}
        self.quick: dict[str, int] = {}
        """Consecutive probes at the quick interval."""
        self.runs = self.failures = self.unable = 0
        self.no_route = False
        """The last probe could not be run because this host has no route to the device."""
        self.adopted = False
        """Whether the condition that a predecessor reported was taken over."""
        self.confirming = 0
        self.confirm_began = self.confirmed_at = float("-inf")
        self.confirmations: list[tuple[str, Outcome, str]] = []
        self.episode = 0
        self.detector = FailureDetector(min(int(p["misses"]) for p in self.config["probes"]))
        self.history: deque[Document] = deque(maxlen=MAX_HISTORY)
        self.since = time.monotonic()
        """Start of the detector's state (monotonic); before this agent's start for a state that was taken over."""
        self._state = self.detector.state
        self._cause, self._rewords, self._reword_at = "", 0, 0.0
        self._waiting: dict[str, Timer] = {}
        """Probe → the timer of its next run."""
        self.names = [f"{n}:{probes.name_of(p)}" for n, p in enumerate(self.config["probes"])]
        self.thresholds: dict[str, Thresholds] = {}
        self._watch_thresholds()
        self.gateway: Gateway | None = None
        if self.config.get("gateway"):
            from watchdog_agent.probes import gateway

            self.gateway = gateway.Gateway(self.loop, self.config["gateway"])

    def _watch_thresholds(self) -> None:
        for name, spec in zip(self.names, self.config["probes"], strict=True):
            if spec.get("warn_time_s") or spec.get("warn_loss"):
                from watchdog_agent.detection.thresholds import Thresholds

                self.thresholds[name] = Thresholds(spec)

    def start(self) -> None:
        """Start probing."""
        for name, spec in zip(self.names, self.config["probes"], strict=True):
            self._probe(name, spec)

    # -- the state, and its start

    def record_state(self) -> bool:
        """Record the time of a state change; return whether the state changed."""
        changed = self._state != self.detector.state
        if changed:
            self._state, self.since = self.detector.state, time.monotonic()
            self._cause, self._rewords, self._reword_at = self.detector.cause, 0, 0.0
        return changed

    def record_history(self) -> None:
        """Add a change of state to the history in /status."""
        state, reason = self.detector.state, self.detector.reason[:200]
        if not self.history or self.history[-1]["state"] != state:
            self.history.append({"at": round(time.time(), 3), "state": state, "reason": reason})

    def restore(self, saved: Document) -> None:
        """Continue with the state, and its start, that an earlier run stored."""
        detector = self.detector
        detector.was_ready = saved.get("was_ready") is True
        detector.restore(saved.get("state"), saved.get("reason"), saved.get("misses"))
        self.record_state()
        if saved.get("state") == detector.state:
            self._began(time.time() - parsing.number_or(saved.get("since"), time.time()))
        if detector.confirmed:
            # Its time is not stored; assume now: if no report is answered now, perhaps none was then.
            self.confirmed_at = time.monotonic()

    def dump(self, *, isolated: bool) -> DetectorState:
        """The detector's part of the stored state. `isolated`: store `offline` as `suspect`, so that the next run, whose
        reports may be answered at once, confirms it again."""
        detector = self.detector
        return {
            "was_ready": detector.was_ready,
            "state": "suspect" if isolated and detector.confirmed else detector.state,
            "reason": detector.reason[:400],
            "misses": detector.misses,
            "since": int(time.time() - (time.monotonic() - self.since)),
        }

    def reconnected(self, isolated: bool) -> None:  # as the reporter calls it
        """A report was answered again: confirm again what was found while none was."""
        if self.agent.exit_code is not None:
            return
        self.episode += 1  # ignore confirmations that began while no answer arrived
        if self.detector.doubt(confirmed_too=isolated):
            self.agent.changed()

    def adopt(self, condition: object) -> bool:
        """Take over the device's condition from the answer to a report, once; return whether it was taken over."""
        if (
            self.adopted
            or not isinstance(condition, dict)
            or condition.get("state") not in ("offline", "degraded")
        ):
            return False
        reason, misses = condition.get("reason"), condition.get("misses")
        text = reason[:400] if isinstance(reason, str) else "as its last agent reported"
        count = misses if type(misses) is int else 0
        if not self.detector.adopt(condition["state"], text, count):
            return False
        self.adopted = True
        self.episode += 1  # discard a confirmation in progress: it is for the previous state
        self.record_state()
        self._began(parsing.number_or(condition.get("age_s"), 0.0))
        return True

    def _began(self, age_s: float) -> None:
        self.since = time.monotonic() - min(max(0.0, age_s), MAX_AGE_S)

    def _cause_changed(self) -> bool:
        """Whether the cause of an unchanged state has changed and must be reported now. The first change is reported at
        once; after that the delay doubles each time, because causes may alternate."""
        now = time.monotonic()
        if self.detector.cause == self._cause or now < self._reword_at:
            return False
        self._cause = self.detector.cause
        self._reword_at = now + self.config.get("beat_s", 15.0) * 2 ** min(self._rewords, 5)
        self._rewords += 1
        return True

    # -- probing

    def _probe(self, name: str, spec: Probe) -> None:
        if self.agent.exit_code is not None:
            return
        self._waiting.pop(name, None)
        asked_at = self.detector.returns

        def done(ok: Outcome, reason: str, took_s: float, warning: str) -> None:
            self._probed(name, spec, ok, reason, took_s, warning, asked_at)
            overtaken = name in self.detector.to_ask and asked_at != self.detector.returns
            pause = 0.0 if overtaken else self._pace(name, spec) - took_s
            self._probe_in(max(0.05, pause), name, spec)

        builtin.start(self.loop, spec, self.config["address"], done)

    def _probe_in(self, delay_s: float, name: str, spec: Probe) -> None:
        self._waiting[name] = self.loop.later(delay_s, lambda: self._probe(name, spec))

    def _ask_again(self, returns: int) -> None:
        """If an offline device has answered since the count was `returns`, run the probes that missed now, not one
        interval later. A probe in progress runs again when it has ended."""
        if self.detector.returns == returns:
            return
        for name, spec in zip(self.names, self.config["probes"], strict=True):
            timer = self._waiting.pop(name, None) if name in self.detector.to_ask else None
            if timer is not None:
                timer[2] = None
                self._probe_in(0.0, name, spec)

    def _pace(self, name: str, spec: Probe) -> float:
        """Seconds between the starts of two probes, with jitter."""
        quick = self.quick.get(name, 0)
        wanted: float = probe_interval.interval(
            spec["interval_s"], spec["min_interval_s"], self.detector.state, quick
        )
        if self.detector.state != "suspect":
            self.quick.pop(name, None)
        elif wanted < spec["interval_s"]:
            self.quick[name] = quick + 1
        return wanted * between(1 - spec["jitter"], 1 + spec["jitter"])

    def _probed(
        self,
        name: str,
        spec: Probe,
        ok: Outcome,
        reason: str,
        took_s: float,
        warning: str,
        asked_at: int,
    ) -> None:
        was_ready, returns = self.detector.was_ready, self.detector.returns
        first = name not in self.results
        need, warning = self._count(name, spec, ok, took_s, warning)
        self.no_route = isinstance(reason, outcomes.NoRoute)
        self._record(name, outcomes.result_json(ok, reason, took_s, warning))
        label = probes.name_of(spec)
        shown = reason if ok else f"{label}: {reason}"
        exceeded = f"{label}: {warning}" if warning else ""
        changed = self.detector.probed(name, ok, shown, need, exceeded, asked_at)
        self.record_state()
        self._ask_again(returns)
        self.episode += changed
        if self._cause_changed() or changed or self.detector.was_ready != was_ready:
            self.agent.changed()
        if ok and self.gateway is not None:
            self.gateway.answers = None
        if ok is False:
            self._doubt(name, spec)
        if first:
            self.agent.watch_ready()
        self.agent.probed(ok)

    def _count(
        self, name: str, spec: Probe, ok: Outcome, took_s: float, warning: str
    ) -> tuple[int, str]:
        """(consecutive misses that make the device suspect, warnings of this result)."""
        self.runs += 1
        self.failures += ok is False
        self.unable += ok is None
        stats = self.stats.setdefault(name, Stats())
        need = probe_interval.need(int(spec["misses"]), *stats.earlier())
        if ok is not None:
            stats.add(ok, took_s)
        if name in self.thresholds:
            exceeded = self.thresholds[name].record(ok, took_s, need)
            warning = "; ".join(one for one in (warning, exceeded) if one)
        return need, warning

    def _record(self, name: str, result: ProbeResult) -> None:
        first = name not in self.results
        self.results[name] = {**result, "at": time.time()}
        if first:  # in the order of the configuration, not of completion
            self.results = {n: self.results[n] for n in self.names if n in self.results}

    def _doubt(self, name: str, spec: Probe) -> None:
        """After a miss: probe the gateway first, then confirm."""
        detector = self.detector
        if self.gateway is None or detector.state in ("offline", "degraded"):
            self._want_confirmation(name, spec)
        elif detector.wants_confirmation() or detector.behind:

            def answered(alive: Outcome) -> None:
                if self.behind(alive):
                    self._want_confirmation(name, spec)

            self.gateway.probe(answered)

    def behind(self, alive: Outcome) -> bool:
        """Record the outcome of the gateway's probe; return whether the gateway answers."""
        assert self.gateway is not None
        if alive:
            self.agent.gateway_answers()
        if self.detector.gateway(alive, self.gateway.describe()):
            self.record_state()
            self.agent.changed()
        return bool(alive)

    def _want_confirmation(self, name: str, spec: Probe) -> None:
        # Confirmations stay one interval apart at the quick interval too: see probe_interval.
        apart_s = spec["interval_s"] * (1 - spec["jitter"])
        soon = time.monotonic() - self.confirm_began < apart_s
        quick = 0 < self.quick.get(name, 0) < probe_interval.MAX_QUICK
        held = self.confirming or (soon and quick)
        if self.detector.wants_confirmation() and not held:
            self._confirm()

    def _confirm(self) -> None:
        self.confirm_began = time.monotonic()
        specs = self.config["confirm"]
        self.confirming = len(specs)
        episode = self.episode
        answers: list[tuple[str, Outcome, str]] = []

        def done(spec: Probe, ok: Outcome, reason: str) -> None:
            self.confirming -= 1
            if ok is False and not self._independent(spec):
                ok, reason = None, f"{reason}; that is no independent evidence"
            answers.append((probes.name_of(spec), ok, reason))
            # The device may have returned and failed again meanwhile; that needs a new confirmation.
            if not self.confirming and self.episode == episode:
                self._confirmed(answers, episode)

        def start(spec: Probe) -> None:
            address = self.config["address"]
            builtin.start(self.loop, spec, address, lambda ok, why, *_: done(spec, ok, why))

        for spec in specs:
            start(spec)

    def _confirmed(self, answers: list[tuple[str, Outcome, str]], episode: int) -> None:
        """Evaluate the confirmations after all have ended."""
        answers.sort(key=lambda answer: _WEIGHT.index(answer[1]))
        self.confirmations = answers
        name, ok, reason = answers[0]

        def apply() -> None:
            if self.episode != episode:
                return
            returns = self.detector.returns
            changed = self.detector.confirmation(name, ok, reason)
            self.record_state()
            self._ask_again(returns)
            if changed:
                if self.detector.confirmed:
                    self.confirmed_at = time.monotonic()
                self.agent.confirmed()

        def answered(alive: Outcome) -> None:
            self.confirming = 0
            if self.behind(alive):
                apply()

        if ok is False and self.gateway is not None:
            # The gateway may have failed meanwhile: the failure counts only if it answers now.
            self.confirming = 1
            self.gateway.probe(answered)
        else:
            apply()

    def _independent(self, spec: Probe) -> bool:
        """Whether a failure of this confirmation is evidence in addition to the probes. Without permission to ping it is
        not: TCP to a port that was not configured may be filtered, and probes that fell back to TCP share the path of
        a TCP confirmation."""
        if spec.get("instead"):
            return False
        instead = all(one.get("instead") for one in self.config["probes"])
        return spec["kind"] != "tcp" or not instead

    def status(self) -> ProberStatus:
        """The prober's part of /status."""
        return {
            "was_ready": self.detector.was_ready,
            "misses": self.detector.misses,
            "confirmed": self.detector.confirmed,
            "probes": {n: {**r, "stats": self.stats[n].summary()} for n, r in self.results.items()},
            "runs": {"total": self.runs, "failed": self.failures, "unable": self.unable},
            "evidence": self.evidence(),
            "history": list(self.history),
        }

    def evidence(self) -> Document:
        """The evidence for the state: failing probes, warnings, the last confirmation, the gateway."""
        failing = {name: r["reason"] for name, r in self.results.items() if not r["ok"]}
        warned = {name: r["warning"] for name, r in self.results.items() if "warning" in r}
        evidence: Document = {"failing": failing}
        if warned:
            evidence["warnings"] = warned
        if self.confirmations and self.detector.state != "ok":
            evidence["confirm"] = [
                {"probe": name, "ok": bool(ok), "unable": ok is None, "reason": reason}
                for name, ok, reason in self.confirmations
            ]
        if self.gateway is not None:
            evidence["gateway"] = self.gateway.evidence()
        return evidence

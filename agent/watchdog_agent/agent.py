"""The agent of one device: probes it, determines its state, reports, and stops on request."""

from __future__ import annotations

import os
import time

from watchdog_agent import wire
from watchdog_agent.config import document as configuration
from watchdog_agent.detection.prober import Prober
from watchdog_agent.probes import builtin
from watchdog_agent.reporting import prometheus, reporter
from watchdog_agent.runtime import http
from watchdog_agent.runtime import state_file as state
from watchdog_agent.runtime.log import log, shippers
from watchdog_agent.runtime.loop import Loop, between
from watchdog_agent.runtime.stdlib_light import json, signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from watchdog_agent.consul import registration
    from watchdog_agent.consul.kept_state import ConsulState
    from watchdog_agent.detection.on_demand import OnDemand
    from watchdog_agent.escalation.escalations import Escalations
    from watchdog_agent.repairs.runner import RepairRunner
    from watchdog_agent.reporting.loki import LokiShipper
    from watchdog_agent.runtime.status_types import Status
    from watchdog_agent.runtime.types import Answer, Config, Document, Outcome, SavedState
    from watchdog_agent.wire import Report

    Then = Callable[[Callable[[], None]], None]


class Agent:
    """Connects the agent's components. All of them run on one thread, in `loop`."""

    SAVE_EVERY_S = 60.0
    SHUT_DOWN_S = 2.5
    DEPART_S = 3.0
    """Shutdown timeout of an agent whose device has left, in seconds."""

    def __init__(self, config: Config, environ: Mapping[str, str]) -> None:
        self.config = config
        self.log = log
        self.instance = configuration.instance_of(environ)
        self.folder = configuration.state_dir_of(environ)
        self.began = time.monotonic()
        self.loop = Loop()
        self.prober = Prober(self)
        self.on_demand: OnDemand | None = None
        self.exit_code: int | None = None
        self.was_signalled = False
        self.departed = False
        """Whether the device has left the registry."""
        saved, remark = state.load(self.folder, config["device_id"]) if self.folder else ({}, "")
        if remark:
            log(remark)
        self.reporting = False
        host, port = configuration.listen_of(environ)
        self.server = http.Server(self.loop, host, port, self.answer)
        self.reporter = reporter.Reporter(self.loop, config, self.make_report, self.retire, log)
        self.reporter.confirmed_since = lambda since: self.prober.confirmed_at > since
        self.reporter.on_reconnected = self.prober.reconnected
        self.reporter.on_isolated = self.save
        self.reporter.on_condition = self._adopt
        self.shipper: LokiShipper | None = None
        self.consul_state: ConsulState | None = None
        self.escalations: Escalations | None = None
        self.repairs: RepairRunner | None = None
        self._load_optional()
        self._restore(saved)
        self.registration: registration.Registration | None = None
        if config.get("consul"):
            from watchdog_agent.consul import registration

            self.registration = registration.Registration(
                self.loop, config, self.instance, self.server.address, log, self.watch_ready
            )
            self.reporter.after_answer = self.registration.answered
        self._load_repairs(saved)

    def _load_optional(self) -> None:
        """Import only the configured components, so that other agents do not need memory for them."""
        if "loki" in self.config:
            from watchdog_agent.reporting import loki

            self.shipper = loki.LokiShipper(self.loop, self.config)
            shippers.append(self.shipper.put)
        if "escalate" in self.config:
            from watchdog_agent.escalation import escalations

            self.escalations = escalations.Escalations(self.loop, self.config, self.instance, log)
        if self.config.get("state") == "consul" and self.config.get("consul") and not self.folder:
            from watchdog_agent.consul import kept_state

            self.consul_state = kept_state.ConsulState(self.loop, self.config, log)

    def _load_repairs(self, saved: Document) -> None:
        """Start the repair ladder; without one, only undo what an earlier run left behind."""
        if self.config.get("repairs"):
            from watchdog_agent.repairs import runner

            self.repairs = runner.RepairRunner(self, saved.get("repairs"))
            self.reporter.on_status = self.repairs.report_answered
        elif saved.get("repairs"):
            from watchdog_agent.repairs import kinds

            kinds.recover(saved["repairs"], log)

    def _restore(self, saved: Document) -> None:
        self.prober.restore(saved)
        sequence = saved.get("sequence")
        self.reporter.sequence = sequence if type(sequence) is int and sequence > 0 else 0
        if self.escalations is not None:
            self.escalations.restore(saved.get("escalations"))
            self.escalations.on_change = self.save

    def ready(self) -> bool:
        """Whether registered, with the first round of probes done."""
        registered = self.registration is None or self.registration.done
        return registered and self.round_done()

    def round_done(self) -> bool:
        """Whether each probe has ended at least once."""
        return len(self.prober.results) == len(self.config["probes"])

    def run(self) -> int:
        """Run until retired or signalled; return the exit code."""
        self.loop.on_signals((signal.SIGTERM, signal.SIGINT), self.signalled)
        self._write_address()
        log("agent started", listen=self.server.address, epoch=self.config["epoch"])
        self.loop.later(self.SAVE_EVERY_S * between(0.8, 1.2), self._save_periodically)
        self.live()
        return wire.EXIT_CRASH if self.exit_code is None else self.exit_code

    def live(self) -> None:
        """Register, probe and report until the loop stops."""
        if self.registration is not None and not self.reporter.urls:
            self.registration.start()  # no control plane decides whether this agent is accepted
        if self.consul_state is not None:
            self.consul_state.load(self._begin)
        else:
            self._begin({})
        if self.repairs is not None:
            self.repairs.start()
        try:
            self.loop.run()
        finally:
            if self.repairs is not None:
                self.repairs.abandon()
            builtin.close()

    def _begin(self, saved: Document) -> None:
        """Restore the state that an earlier run stored in Consul, then start probing."""
        if saved:
            self._restore(saved)
        self.prober.start()
        self._update_escalations()

    # -- the state of the device

    def changed(self) -> None:
        """Record, store and report a change of the device's state."""
        detector = self.prober.detector
        self.prober.record_history()
        log("state", state=detector.state, reason=detector.reason)
        self._update_escalations()
        self.save()
        self.send_report()

    def _update_escalations(self) -> None:
        if self.escalations is not None and self.exit_code is None:
            from watchdog_agent.escalation import triggers

            gateway = self.prober.gateway.address if self.prober.gateway is not None else ""
            triggers.update(self.escalations, self.prober.detector, self.prober.results, gateway)

    def probed(self, outcome: Outcome) -> None:
        """Handle the end of a probe whose result is recorded."""
        if self.repairs is not None:
            self.repairs.probed(outcome)

    def confirmed(self) -> None:
        """Handle a state change by a confirmation."""
        self.changed()
        if self.repairs is not None:
            self.repairs.tick()

    def _adopt(self, condition: object) -> None:
        """Take over, from the answer to a report, a condition of the device that began before this agent."""
        if self.exit_code is None and self.prober.adopt(condition):
            log("condition taken over", state=self.prober.detector.state)
            self.changed()
            if self.repairs is not None:
                self.repairs.tick()

    def gateway_answers(self) -> None:
        """Handle an answer of the device's gateway."""
        if self.escalations is not None:
            self.escalations.clear("gateway")

    # -- reporting

    def send_report(self) -> None:
        """Report now, because something has changed."""
        if self.reporting and self.exit_code is None:
            self.reporter.changed()

    def watch_ready(self) -> None:
        """After the first round of probes, start reporting, as not ready: registration in Consul waits for the answer,
        which states whether this is the accepted agent. Once registered, report again, as ready."""
        if self.exit_code is not None or not self.round_done():
            return
        if self.reporting:
            self.reporter.changed()
        else:
            self.reporting = True
            self.reporter.start()

    def reported_state(self) -> tuple[str, str]:
        """(state, reason) for reports and /status: `repairing` while a repair is in progress."""
        state, reason = self.prober.detector.state, self.prober.detector.reason
        repair = self.repairs.active() if self.repairs is not None and state != "ok" else ""
        return ("repairing", f"{repair}; {reason}") if repair else (state, reason)

    def state_age_s(self) -> float:
        """Seconds since the state returned by `reported_state` began."""
        since, current = self.prober.since, None
        if self.repairs is not None and self.prober.detector.state != "ok":
            current = self.repairs.ladder.current
        return max(0.0, time.monotonic() - (since if current is None else current["at"]))

    def make_report(self, sequence: int, dropped: int, stopping: bool) -> Report:
        """Build a report of the current state."""
        detector = self.prober.detector
        state, reason = self.reported_state()
        return wire.report(
            self.config,
            instance=self.instance,
            sequence=sequence,
            ready=self.ready() and not stopping,
            state=state,
            state_age_s=self.state_age_s(),
            was_ready=detector.was_ready,
            misses=detector.misses,
            confirmed=detector.confirmed,
            reason=reason[:400],
            listen=self.server.address,
            dropped=dropped,
            stopping=stopping,
            repairs=self.repairs.report() if self.repairs is not None else None,
            gateway=self.prober.gateway.address if self.prober.gateway is not None else "",
            gateway_dead=bool(detector.behind),
        )

    def answer(self, path: str, accept: str = "", method: str = "GET") -> Answer | None:
        """The response of the agent's HTTP server: (status, content type, body), or None if there is no such page."""
        if path == "/probe":
            return self._on_demand(method)
        if method != "GET":
            return None
        if path == "/healthz":
            # Consul stores the output of a check, so the text changes only when the condition does.
            text = self.reporter.trouble and f"{self.reporter.trouble}\n"
            return 200, "text/plain", (text or "ok\n").encode()
        if path == "/ready":
            return (200, "text/plain", b"ready\n") if self.ready() else (503, "text/plain", b"no\n")
        if path == "/metrics":
            return prometheus.answer(self.status(), accept)
        if path == "/status":
            return 200, "application/json", json.dumps(self.status()).encode()
        return None

    def _on_demand(self, method: str) -> Answer | None:
        if self.on_demand is None:
            if method != "POST":
                return None
            from watchdog_agent.detection import on_demand

            self.on_demand = on_demand.OnDemand(self.loop, self.config)
        return self.on_demand.start() if method == "POST" else self.on_demand.progress()

    def status(self) -> Status:
        """The body of /status."""
        state, reason = self.reported_state()
        status: Status = {
            "device_id": self.config["device_id"],
            "slug": self.config["slug"],
            "epoch": self.config["epoch"],
            "version": self.config.get("version", ""),
            "instance": self.instance,
            "pid": os.getpid(),
            "ready": self.ready(),
            "state": state,
            "reason": reason,
            "state_age_s": round(self.state_age_s(), 3),
            "uptime_s": round(time.monotonic() - self.began, 3),
            **self.prober.status(),  # type: ignore[typeddict-item]  # the optional keys follow
            "reports": self.reporter.status(),
        }
        if self.repairs is not None:
            status["repairs"] = self.repairs.status()
        if self.escalations is not None:
            status["escalations"] = self.escalations.status()
        if self.shipper is not None:
            status["logs"] = self.shipper.status()
        return status

    # -- ending

    def signalled(self, number: int) -> None:
        """Shut down with exit code 128 + number; a second signal stops the agent at once. The first signal after a 410,
        which the scheduler sends for the same reason, does not interrupt the shutdown."""
        if self.was_signalled:
            self.loop.stop()
            return
        self.was_signalled = True
        log(wire.LOG_SIGNALLED, number=number)
        if self.exit_code is None:
            self._shut_down(128 + number)

    def retire(self, reason: str, departed: bool = False) -> None:  # as the reporter calls it
        """Shut down because the control plane does not accept this agent. `departed`: the device has left the registry,
        so no other agent resolves its alerts."""
        self.departed = departed
        if self.exit_code is None:
            log(wire.LOG_RETIRED, reason=reason)
            self._shut_down(wire.EXIT_RETIRED, report=False)

    def _shut_down(self, code: int, *, report: bool = True) -> None:
        """Shut down the components one by one. Each has its own timeout; SHUT_DOWN_S limits the total."""
        self.exit_code = code
        self.limit = self.loop.later(self.SHUT_DOWN_S, self.loop.stop)
        self.save()
        steps: list[Then] = [] if self.repairs is None else [self.repairs.close]
        steps += [self.reporter.close] if report else []
        steps += [self._end_escalations, self._delete_state]
        steps += [one.close for one in (self.registration, self.shipper) if one is not None]
        self._run_steps(steps)

    def _run_steps(self, steps: list[Then]) -> None:
        if not steps:
            self.loop.stop()
            return
        steps[0](lambda: self._run_steps(steps[1:]))

    def _end_escalations(self, then: Callable[[], None]) -> None:
        if self.escalations is None:
            then()
        elif self.departed:  # the answer to the last report may have stated that
            # No other agent resolves them, so the timeout is longer, but below Nomad's kill timeout of 5 s.
            self.limit[2] = None
            self.loop.later(self.DEPART_S, self.loop.stop)
            self.escalations.depart(then)
        else:
            self.escalations.close(then)

    def _delete_state(self, then: Callable[[], None]) -> None:
        if self.consul_state is not None and self.departed:
            self.consul_state.delete(then)
        else:
            then()

    # -- stored state

    def _save_periodically(self) -> None:
        self.save()
        self.loop.later(self.SAVE_EVERY_S * between(0.8, 1.2), self._save_periodically)

    def save(self) -> bool:
        """Store the state that survives a restart; return False on failure."""
        if not self.folder and self.consul_state is None:
            return False
        saved: SavedState = {
            "device_id": self.config["device_id"],
            **self.prober.dump(isolated=self.reporter.isolated),  # type: ignore[typeddict-item]
            "sequence": self.reporter.sequence,
        }
        if self.escalations is not None:
            saved["escalations"] = self.escalations.dump()
        if self.consul_state is not None:
            self.consul_state.save(saved)
            return True
        if self.repairs is not None:
            saved["repairs"] = self.repairs.dump()
        try:
            state.save(self.folder, saved)
        except OSError as error:
            log("state can't be saved", reason=http.reason_of(error))
            return False
        return True

    def _write_address(self) -> None:
        try:
            if self.folder:
                state.save_address(self.folder, self.server.address, self.instance)
        except OSError as error:
            log("address can't be written", reason=http.reason_of(error))

"""The agent of one device: probes it, judges what it finds, reports, and stops on request."""

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
from watchdog_agent.runtime.stdlib_light import deque, json, signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from watchdog_agent.consul import registration
    from watchdog_agent.consul.kept_state import ConsulState
    from watchdog_agent.detection.on_demand import OnDemand
    from watchdog_agent.escalation.escalations import Escalations
    from watchdog_agent.repairs.runner import RepairRunner
    from watchdog_agent.reporting.loki import LokiShipper
    from watchdog_agent.runtime.types import Answer, Config, Document, Outcome


class Agent:
    """Ties the parts together. All of it runs on one thread, in `loop`."""

    SAVE_EVERY_S = 60.0
    SHUT_DOWN_S = 2.5
    DEPART_S = 3.0
    """From the word that the device has left to the end of its alerts and of the agent."""
    HISTORY = 32
    """Changes of state that /status remembers."""

    def __init__(self, config: Config, environ: Mapping[str, str]) -> None:
        self.config = config
        self.log = log
        self.instance = configuration.instance_of(environ)
        self.folder = configuration.state_dir_of(environ)
        self.began = time.monotonic()
        self.loop = Loop()
        self.diagnosis = Prober(self)
        self.history: deque[dict[str, Any]] = deque(maxlen=self.HISTORY)
        self.asked: OnDemand | None = None
        self.exit_code: int | None = None
        self.was_signalled = False
        self.departed = False
        """Whether the device has left the registry."""
        kept, remark = state.load(self.folder, config["device_id"]) if self.folder else ({}, "")
        if remark:
            log(remark)
        self.reporting = False
        host, port = configuration.listen_of(environ)
        self.server = http.Server(self.loop, host, port, self.answer)
        self.reporter = reporter.Reporter(self.loop, config, self.report, self.retire, log)
        self.reporter.confirmed_since = lambda since: self.diagnosis.confirmed_at > since
        self.reporter.doubt = self._doubt
        self.reporter.parted = self._save
        self.reporter.condition = self._adopt
        self.shipper: LokiShipper | None = None
        self.keeper: ConsulState | None = None
        self.escalations: Escalations | None = None
        self.repairs: RepairRunner | None = None
        self._optional()
        self._restore(kept)
        self.registration: registration.Registration | None = None
        if config.get("consul"):
            from watchdog_agent.consul import registration

            self.registration = registration.Registration(
                self.loop, config, self.instance, self.server.address, log, self.watch_ready
            )
            self.reporter.answered = self.registration.answered
        self._mend(kept)

    def _mend(self, kept: Document) -> None:
        """Take up the ladder of repairs, or at least undo what an earlier run has left behind."""
        if self.config.get("repairs"):
            from watchdog_agent.repairs import runner

            self.repairs = runner.RepairRunner(self, kept.get("repairs"))
            self.reporter.heard = self.repairs.heard
        elif kept.get("repairs"):
            from watchdog_agent.repairs import kinds

            kinds.recover(kept["repairs"], log)

    def _optional(self) -> None:
        """What only some are configured for: nobody else pays for its import."""
        if "loki" in self.config:
            from watchdog_agent.reporting import loki

            self.shipper = loki.LokiShipper(self.loop, self.config)
            shippers.append(self.shipper.put)
        if "escalate" in self.config:
            from watchdog_agent.escalation import escalations

            self.escalations = escalations.Escalations(self.loop, self.config, self.instance, log)
        if self.config.get("state") == "consul" and self.config.get("consul") and not self.folder:
            from watchdog_agent.consul import kept_state

            self.keeper = kept_state.ConsulState(self.loop, self.config, log)

    def _restore(self, kept: Document) -> None:
        self.diagnosis.restore(kept)
        sequence = kept.get("sequence")
        self.reporter.sequence = sequence if type(sequence) is int and sequence > 0 else 0
        if self.escalations is not None:
            self.escalations.restore(kept.get("escalations"))
            self.escalations.changed = self._save

    def ready(self) -> bool:
        """Registered, and the first round of probes is done."""
        registered = self.registration is None or self.registration.done
        return registered and self.round_done()

    def round_done(self) -> bool:
        """Each probe has ended once."""
        return len(self.diagnosis.results) == len(self.config["probes"])

    def run(self) -> int:
        """Until told to retire or signalled; the exit code."""
        self.loop.on_signals((signal.SIGTERM, signal.SIGINT), self.signalled)
        self._write_address()
        log("agent started", listen=self.server.address, epoch=self.config["epoch"])
        self.loop.later(self.SAVE_EVERY_S * between(0.8, 1.2), self._save_again)
        self.live()
        return wire.EXIT_CRASH if self.exit_code is None else self.exit_code

    def live(self) -> None:
        """Register, probe and report until the loop is stopped."""
        if self.registration is not None and not self.reporter.urls:
            self.registration.start()  # nobody accepts us
        if self.keeper is not None:
            self.keeper.load(self._begin)
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

    def _begin(self, kept: Document) -> None:
        """Probe; what an earlier run has left in Consul comes first, so that we don't forget it."""
        if kept:
            self._restore(kept)
        self.diagnosis.start()
        self._unrepaired()

    # -- what is believed

    def changed(self) -> None:
        """What is believed of the device has changed."""
        believed = self.diagnosis.suspicion
        if not self.history or self.history[-1]["state"] != believed.state:
            at = {"at": round(time.time(), 3), "state": believed.state}
            self.history.append({**at, "reason": believed.reason[:200]})
        log("state", state=self.diagnosis.suspicion.state, reason=self.diagnosis.suspicion.reason)
        self._unrepaired()
        self._save()
        self.tell()

    def _unrepaired(self) -> None:
        """Escalate a device that is offline, or a gateway that is dead, and their return. Where there is
        a ladder of repairs, that comes first, and who climbs it calls."""
        if self.escalations is None or self.exit_code is not None:
            return
        if (
            self.diagnosis.gateway is not None
            and self.diagnosis.suspicion.behind
            and self.diagnosis.suspicion.was_ready
        ):
            # never offline, as nothing behind it can be confirmed: it is the gateway that is missed
            evidence = {"probes": self.diagnosis.results, "gateway": self.diagnosis.gateway.address}
            self.escalations.raise_("gateway", self.diagnosis.suspicion.behind, evidence)
        elif self.diagnosis.suspicion.well:
            self.escalations.clear("gateway")
        if self.config.get("repairs"):
            return
        if self.diagnosis.suspicion.state == "offline":
            evidence = {"probes": self.diagnosis.results, "reason": self.diagnosis.suspicion.reason}
            self.escalations.raise_("offline", self.diagnosis.suspicion.reason, evidence)
        elif self.diagnosis.suspicion.state == "degraded":
            self.escalate_degraded({})
        elif self.diagnosis.suspicion.well:
            self.escalations.clear("offline")
            self.escalations.clear("degraded")

    def escalate_degraded(self, more: Document) -> bool:
        """Escalate that the device is degraded, where the class says so; whether it does. The escalation that
        it is offline ends then, and only then: without the other, no one would know that it is not well."""
        if self.escalations is None or not self.config["escalate"]["degraded"]:
            return False
        reason = self.diagnosis.suspicion.reason
        evidence = {"probes": self.diagnosis.results, "reason": reason, **more}
        self.escalations.raise_("degraded", reason, evidence)
        self.escalations.clear("offline")
        return True

    def probed(self, ok: Outcome) -> None:
        """A probe has ended, and its result is taken."""
        if self.repairs is not None:
            self.repairs.probed(ok)

    def confirmed(self) -> None:
        """A confirmation has changed what is believed."""
        self.changed()
        if self.repairs is not None:
            self.repairs.look()

    def _doubt(self, alone: bool) -> None:  # as the reporter says it
        if self.exit_code is not None:
            return
        self.diagnosis.episode += 1  # what was asked while nobody was heard is dropped
        if self.diagnosis.suspicion.doubt(confirmed_too=alone):
            self.changed()

    def _adopt(self, condition: object) -> None:
        """The answer to a report has the device's condition, which began before this agent."""
        if self.exit_code is None and self.diagnosis.adopt(condition):
            log("condition taken over", state=self.diagnosis.suspicion.state)
            self.changed()
            if self.repairs is not None:
                self.repairs.look()

    def gateway_answers(self) -> None:
        """What stands before the device is alive."""
        if self.escalations is not None:
            self.escalations.clear("gateway")

    def tell(self) -> None:
        """Something worth a report has happened."""
        if self.reporting and self.exit_code is None:
            self.reporter.changed()

    def watch_ready(self) -> None:
        """Begin to report after the first round of probes, as not ready: registration in Consul waits for the
        answer, which says whether we are the accepted agent. Then report again, as ready."""
        if self.exit_code is not None or not self.round_done():
            return
        if self.reporting:
            self.reporter.changed()
        else:
            self.reporting = True
            self.reporter.start()

    # -- telling

    def believed(self) -> tuple[str, str]:
        """(state, reason) as they are told: what is being done goes before what is wrong."""
        state, reason = self.diagnosis.suspicion.state, self.diagnosis.suspicion.reason
        doing = self.repairs.active() if self.repairs is not None and state != "ok" else ""
        return ("repairing", f"{doing}; {reason}") if doing else (state, reason)

    def state_age_s(self) -> float:
        """Seconds since the state that `believed` gives began."""
        since, current = self.diagnosis.since, None
        if self.repairs is not None and self.diagnosis.suspicion.state != "ok":
            current = self.repairs.ladder.current
        return max(0.0, time.monotonic() - (since if current is None else current["at"]))

    def report(self, sequence: int, dropped: int, stopping: bool) -> Document:
        """The report as of now."""
        believed = self.diagnosis.suspicion
        state, reason = self.believed()
        return wire.report(
            self.config,
            instance=self.instance,
            sequence=sequence,
            ready=self.ready() and not stopping,
            state=state,
            state_age_s=self.state_age_s(),
            was_ready=believed.was_ready,
            misses=believed.misses,
            confirmed=believed.confirmed,
            reason=reason[:400],
            listen=self.server.address,
            dropped=dropped,
            stopping=stopping,
            repairs=self.repairs.told() if self.repairs is not None else None,
            gateway=self.diagnosis.gateway.address if self.diagnosis.gateway is not None else "",
            gateway_dead=bool(believed.behind),
        )

    def answer(self, path: str, accept: str = "", method: str = "GET") -> Answer | None:
        """What the server says: (status, content type, body) or None."""
        if path == "/probe":
            return self._on_demand(method)
        if method != "GET":
            return None
        if path == "/healthz":
            # Consul stores the text of a check: it changes only when what it reports does.
            text = self.reporter.trouble and f"{self.reporter.trouble}\n"
            return 200, "text/plain", (text or "ok\n").encode()
        if path == "/ready":
            return (200, "text/plain", b"ready\n") if self.ready() else (503, "text/plain", b"no\n")
        if path == "/metrics":
            if "openmetrics" in accept.lower():
                from watchdog_agent.reporting import openmetrics

                if openmetrics.wanted(accept):
                    return (
                        200,
                        openmetrics.KIND,
                        openmetrics.converted(prometheus.render(self.status())),
                    )
            return 200, "text/plain; version=0.0.4", prometheus.render(self.status())
        if path == "/status":
            return 200, "application/json", json.dumps(self.status()).encode()
        return None

    def _on_demand(self, method: str) -> Answer | None:
        if self.asked is None:
            if method != "POST":
                return None
            from watchdog_agent.detection import on_demand

            self.asked = on_demand.OnDemand(self.loop, self.config)
        return self.asked.start() if method == "POST" else self.asked.look()

    def status(self) -> Document:
        """What is known, for people and scripts."""
        believed, told = self.diagnosis.suspicion, self.reporter
        state, reason = self.believed()
        more: Document = {}
        if self.repairs is not None:
            more["repairs"] = self.repairs.status()
        if self.escalations is not None:
            more["escalations"] = self.escalations.status()
        if self.shipper is not None:
            shipped = self.shipper
            more["logs"] = {
                "shipped": shipped.shipped,
                "dropped": shipped.dropped,
                "refused": shipped.refused,
            }
        return more | {
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
            "was_ready": believed.was_ready,
            "misses": believed.misses,
            "confirmed": believed.confirmed,
            "uptime_s": round(time.monotonic() - self.began, 3),
            "probes": {
                n: {**r, "stats": self.diagnosis.stats[n].summary()}
                for n, r in self.diagnosis.results.items()
            },
            "runs": {
                "total": self.diagnosis.runs,
                "failed": self.diagnosis.failures,
                "unable": self.diagnosis.unable,
            },
            "evidence": self.diagnosis.evidence(),
            "history": list(self.history),
            "reports": {
                "sent": told.sent,
                "failed": told.failed,
                "dropped": told.dropped,
                "trouble": told.trouble,
            },
        }

    # -- ending

    def signalled(self, number: int) -> None:
        """Shut down with 128 + number; a second signal does not wait. The first one that comes after a 410, as
        a scheduler sends it for the same reason, cuts nothing short."""
        if self.was_signalled:
            self.loop.stop()
            return
        self.was_signalled = True
        log("signal", number=number)
        if self.exit_code is None:
            self._shut_down(128 + number)

    def retire(self, reason: str, departed: bool = False) -> None:  # as the answer says it
        """The control plane says that we are not the accepted agent (any more); `departed`: nobody is, for
        the device is gone, so that what we have told of it must end with us."""
        self.departed = departed
        if self.exit_code is None:
            log("told to retire", reason=reason)
            self._shut_down(wire.EXIT_RETIRED, tell=False)

    def _shut_down(self, code: int, *, tell: bool = True) -> None:
        self.exit_code = code
        self.limit = self.loop.later(self.SHUT_DOWN_S, self.loop.stop)

        def leave() -> None:
            self._save()
            if tell:
                self.reporter.close(self._deregister)
            else:
                self._deregister()

        if self.repairs is not None:
            self.repairs.close(leave)
        else:
            leave()

    def _deregister(self) -> None:
        """Leave one after the other; each has its own time limit, and SHUT_DOWN_S is over all."""
        if self.escalations is not None and self.departed:
            # Nobody else will say it: that is worth more time, and stays below Nomad's kill timeout of 5 s.
            self.limit[2] = None
            self.loop.later(self.DEPART_S, self.loop.stop)
            self.escalations.depart(self._leave)
        elif self.escalations is not None:
            self.escalations.close(self._leave)
        else:
            self._leave()

    def _leave(self) -> None:
        if self.keeper is not None and self.departed:
            self.keeper.forget(self._unregister)
        else:
            self._unregister()

    def _unregister(self) -> None:
        if self.registration is None:
            self._finish()
        else:
            self.registration.close(self._finish)

    def _finish(self) -> None:
        if self.shipper is None:
            self.loop.stop()
        else:
            self.shipper.close(self.loop.stop)

    # -- keeping

    def _save_again(self) -> None:
        self._save()
        self.loop.later(self.SAVE_EVERY_S * between(0.8, 1.2), self._save_again)

    def save(self) -> bool:
        """Keep what outlives us; false when it could not be kept."""
        return self._save()

    def _save(self) -> bool:
        if not self.folder and self.keeper is None:
            return False
        believed = self.diagnosis.suspicion
        kept: Document = {
            "device_id": self.config["device_id"],
            "was_ready": believed.was_ready,
            # what was confirmed alone must not be a claim of the next run, which may be heard at once
            "state": "suspect" if self.reporter.alone and believed.confirmed else believed.state,
            "reason": believed.reason[:400],
            "misses": believed.misses,
            "since": int(time.time() - (time.monotonic() - self.diagnosis.since)),
            "sequence": self.reporter.sequence,
        }
        if self.escalations is not None:
            kept["escalations"] = self.escalations.kept()
        if self.keeper is not None:
            self.keeper.save(kept)
            return True
        if self.repairs is not None:
            kept["repairs"] = self.repairs.kept()
        try:
            state.save(self.folder, kept)
        except OSError as error:
            log("state can't be saved", reason=http.reason_of(error))
            return False
        return True

    def _write_address(self) -> None:
        if not self.folder:
            return
        told = {"pid": os.getpid(), "listen": self.server.address, "instance": self.instance}
        try:
            state.write(os.path.join(self.folder, "agent.json"), json.dumps(told).encode())
        except OSError as error:
            log("address can't be written", reason=http.reason_of(error))

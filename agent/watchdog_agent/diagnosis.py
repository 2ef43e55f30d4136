"""What is found out about the device: probes at their pace, the path before it, independent confirmations.

What is believed of the results is `suspicion`'s; who acts on it is `main`'s.
"""

from __future__ import annotations

import time

from . import pace, probes
from .loop import between
from .stats import Stats
from .suspicion import Suspicion

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .gateway import Gateway
    from .main import Agent
    from .shapes import Document, Probe


class Diagnosis:
    """Probes the device of `agent`, and tells it what changed."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.loop, self.config = agent.loop, agent.config
        self.results: dict[str, dict[str, Any]] = {}
        self.stats: dict[str, Stats] = {}
        self.quick: dict[str, int] = {}
        """Probes in a row at the quick pace."""
        self.runs = self.failures = 0
        self.confirming = 0
        self.confirm_began = self.confirmed_at = float("-inf")
        self.confirmations: list[tuple[str, bool, str]] = []
        self.episode = 0
        self.suspicion = Suspicion(min(int(p["misses"]) for p in self.config["probes"]))
        self.gateway: Gateway | None = None
        if self.config.get("gateway"):
            from . import gateway

            self.gateway = gateway.Gateway(self.loop, self.config["gateway"])

    def start(self) -> None:
        """Begin to probe."""
        for number, spec in enumerate(self.config["probes"]):
            self._probe(f"{number}:{probes.name_of(spec)}", spec)

    def _probe(self, name: str, spec: Probe) -> None:
        if self.agent.exit_code is not None:
            return

        def done(ok: bool, reason: str, took_s: float) -> None:
            self._probed(name, spec, ok, reason, took_s)
            pause = self._pace(name, spec) - took_s
            self.loop.later(max(0.05, pause), lambda: self._probe(name, spec))

        probes.start(self.loop, spec, self.config["address"], done)

    def _pace(self, name: str, spec: Probe) -> float:
        """Seconds from the start of this probe to the start of the next."""
        quick = self.quick.get(name, 0)
        wanted: float = pace.interval(
            spec["interval_s"], spec["min_interval_s"], self.suspicion.state, quick
        )
        if self.suspicion.state != "suspect":
            self.quick.pop(name, None)
        elif wanted < spec["interval_s"]:
            self.quick[name] = quick + 1
        return wanted * between(1 - spec["jitter"], 1 + spec["jitter"])

    def _probed(self, name: str, spec: Probe, ok: bool, reason: str, took_s: float) -> None:
        first = name not in self.results
        self.results[name] = {"ok": ok, "reason": reason, "took_s": took_s, "at": time.time()}
        self.runs += 1
        self.failures += not ok
        was_ready = self.suspicion.was_ready
        shown = reason if ok else f"{probes.name_of(spec)}: {reason}"
        stats = self.stats.setdefault(name, Stats())
        need = pace.need(int(spec["misses"]), *stats.earlier())
        stats.add(ok, took_s)
        changed = self.suspicion.probed(name, ok, shown, need)
        self.episode += changed
        if changed or self.suspicion.was_ready != was_ready:
            self.agent.changed()
        if ok and self.gateway is not None:
            self.gateway.answers = None
        if not ok:
            self._doubt(name, spec)
        if first:
            self.agent.watch_ready()
        self.agent.probed(ok)

    def _doubt(self, name: str, spec: Probe) -> None:
        """A probe was missed: whose fault is it? First what stands before the device is asked."""
        if self.gateway is None or self.suspicion.state != "suspect":
            self._want_confirmation(name, spec)
        else:

            def asked(alive: bool) -> None:
                if self.behind(alive):
                    self._want_confirmation(name, spec)

            self.gateway.ask(asked)

    def behind(self, alive: bool) -> bool:  # as the gateway's callback says it
        """Take what the gateway did; whether it answers."""
        assert self.gateway is not None
        if alive:
            self.agent.gateway_answers()
        if self.suspicion.gateway(alive, self.gateway.words()):
            self.agent.changed()
        return alive

    def _want_confirmation(self, name: str, spec: Probe) -> None:
        # At the quick pace too they stay an interval apart: see pace.
        apart_s = spec["interval_s"] * (1 - spec["jitter"])
        soon = time.monotonic() - self.confirm_began < apart_s
        quick = 0 < self.quick.get(name, 0) < pace.MOST_QUICK
        held = self.confirming or (soon and quick)
        if self.suspicion.wants_confirmation() and not held:
            self._confirm()

    def _confirm(self) -> None:
        self.confirm_began = time.monotonic()
        specs = self.config["confirm"]
        self.confirming = len(specs)
        episode = self.episode
        answers: list[tuple[str, bool, str]] = []

        def done(spec: Probe, ok: bool, reason: str) -> None:
            self.confirming -= 1
            answers.append((probes.name_of(spec), ok, reason))
            # The device may have come back and gone again meanwhile: that is to be asked anew.
            if self.confirming or self.episode != episode:
                return
            # One independent path that works is enough to doubt the probe instead of the device.
            alive = [a for a in answers if a[1]]
            self.confirmations = answers
            if alive or self.gateway is None:
                take(*(alive or answers)[0])
            else:
                # It may have died meanwhile: what failed counts only if it answers now.
                self.confirming = 1
                self.gateway.ask(asked)

        def asked(alive: bool) -> None:
            self.confirming = 0
            if self.behind(alive):
                take(*answers[0])

        def take(name: str, ok: bool, reason: str) -> None:
            if self.episode == episode and self.suspicion.confirmation(name, ok, reason):
                self.confirmed_at = time.monotonic()
                self.agent.confirmed()

        def start(spec: Probe) -> None:
            address = self.config["address"]
            probes.start(self.loop, spec, address, lambda ok, why, _took_s: done(spec, ok, why))

        for spec in specs:
            start(spec)

    def evidence(self) -> Document:
        """What the belief stands on: failing probes, the last confirmation, the gateway."""
        failing = {name: r["reason"] for name, r in self.results.items() if not r["ok"]}
        told: Document = {"failing": failing}
        if self.confirmations and self.suspicion.state != "ok":
            told["confirm"] = [
                {"probe": name, "ok": ok, "reason": reason}
                for name, ok, reason in self.confirmations
            ]
        if self.gateway is not None:
            told["gateway"] = self.gateway.evidence()
        return told

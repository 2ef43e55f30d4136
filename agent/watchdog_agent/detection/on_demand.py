"""On-demand probes (`POST /probe`): run once and displayed; they do not affect the device's state.

The state depends only on probes at their configured interval, so requests here cannot make a device offline
sooner. So any client that reaches the agent may send one, without a token: at most one run per second, and only
of configured probes; the request has no parameters."""

from __future__ import annotations

import time

from watchdog_agent.config import probes
from watchdog_agent.probes import builtin
from watchdog_agent.runtime import outcome
from watchdog_agent.runtime.stdlib_light import json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from watchdog_agent.runtime.loop import Loop
    from watchdog_agent.runtime.types import Answer, Config, Document, Outcome, Probe

EVERY_S = 1.0


class OnDemand:
    """The last on-demand run."""

    def __init__(self, loop: Loop, config: Config) -> None:
        self.loop, self.config = loop, config
        self.number = 0
        self.last = float("-inf")
        self.results: list[Document | None] = []

    def start(self) -> Answer:
        """Run every probe and confirmation now; 202, or 429 less than a second after the last run or while it runs."""
        now = time.monotonic()
        if now - self.last < EVERY_S or None in self.results:
            return (
                429,
                "application/json",
                b'{"error": {"message": "once a second, one at a time"}}',
            )
        self.last = now
        self.number += 1
        specs = [*self.config["probes"], *self.config["confirm"]]
        self.results = [None] * len(specs)
        for place, spec in enumerate(specs):
            self._one(self.number, place, spec)
        return self._answer(202)

    def _one(self, number: int, place: int, spec: Probe) -> None:
        about = {"probe": probes.name_of(spec), "kind": spec["kind"]}

        def done(ok: Outcome, reason: str, took_s: float, warning: str) -> None:
            if number == self.number:
                self.results[place] = {**about, **outcome.result_json(ok, reason, took_s, warning)}

        if "follower" in spec:
            # Each log line is evaluated once, by the scheduled probe; a copy leaves its position unchanged.
            spec = {**spec, "follower": spec["follower"].peek()}
        builtin.start(self.loop, spec, self.config["address"], done)

    def _answer(self, status: int) -> Answer:
        ready = [one for one in self.results if one is not None]
        payload = {"run": self.number, "done": None not in self.results, "results": ready}
        return status, "application/json", json.dumps(payload).encode()

    def progress(self) -> Answer:
        """The results of the last run so far."""
        return self._answer(200)

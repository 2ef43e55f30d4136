"""Prometheus text format (https://prometheus.io/docs/instrumenting/exposition_formats/), without a library."""

from __future__ import annotations

from watchdog_agent import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from watchdog_agent.runtime.status_types import ProbeStats, ProbeStatus, Status
    from watchdog_agent.runtime.types import Answer

    Metric = tuple[str, str, str, Iterable[tuple[str, object]]]
    """Name, type, help, and the samples: labels and value."""


def render(known: Status) -> bytes:
    """The metrics of an agent with this status. The device is the scrape target, so no label repeats it."""
    lines: list[str] = []
    for part in (_agent(known), _probes(known["probes"]), _sent(known), _optional(known)):
        for name, kind, text, values in part:
            lines.append(f"# HELP watchdog_agent_{name} {text}")
            lines.append(f"# TYPE watchdog_agent_{name} {kind}")
            lines.extend(f"watchdog_agent_{name}{labels} {value}" for labels, value in values)
    return ("\n".join(lines) + "\n").encode()


def answer(known: Status, accept: str) -> Answer:
    """The response to a scrape: OpenMetrics if the Accept header asks for it."""
    text = render(known)
    if "openmetrics" in accept.lower():
        from watchdog_agent.reporting import openmetrics

        if openmetrics.wanted(accept):
            return 200, openmetrics.KIND, openmetrics.converted(text)
    return 200, "text/plain; version=0.0.4", text


def _one(value: object) -> list[tuple[str, object]]:
    return [("", value)]


def _agent(known: Status) -> Iterator[Metric]:
    yield "ready", "gauge", "1 when registered and probed once.", _one(int(known["ready"]))
    states = [(f'{{state="{s}"}}', int(s == known["state"])) for s in wire.STATES]
    yield "state", "gauge", "1 for the state that the device is believed to be in.", states
    yield "epoch", "gauge", "The epoch that this agent carries.", _one(known["epoch"])


def _probes(probes: dict[str, ProbeStatus]) -> Iterator[Metric]:
    def each(value: str) -> list[tuple[str, object]]:
        return [(f'{{probe="{n}"}}', values[value]) for n, values in rows]

    rows = [
        (
            name,
            {
                "up": int(result["ok"]),
                "unable": int(result["outcome"] == "unable"),
                "warning": int("warning" in result),
                "took": f"{result['took_s']:.6f}",
                "loss": result["stats"]["loss"],
            },
        )
        for name, result in probes.items()
    ]
    yield "probe_up", "gauge", "1 when the last result of a probe was good.", each("up")
    text = "1 when the agent was unable to ask in the last run of a probe."
    yield "probe_unable", "gauge", text, each("unable")
    yield "probe_warning", "gauge", "1 when a probe exceeds a warning threshold.", each("warning")
    yield "probe_seconds", "gauge", "Duration of the last run of a probe.", each("took")
    text = "Share of the last 60 runs of a probe that failed, 0 to 1."
    yield "probe_loss", "gauge", text, each("loss")
    latencies = [
        (f'{{probe="{name}",stat="{what}"}}', latency)
        for name, result in probes.items()
        for what, latency in _latencies(result["stats"])
        if latency is not None
    ]
    text = "Duration of those of the last 60 runs of a probe that were good."
    yield "probe_latency_seconds", "gauge", text, latencies


def _latencies(stats: ProbeStats) -> tuple[tuple[str, float | None], ...]:
    return (
        ("min", stats["min_s"]),
        ("mean", stats["mean_s"]),
        ("p50", stats["p50_s"]),
        ("p95", stats["p95_s"]),
        ("max", stats["max_s"]),
    )


def _sent(known: Status) -> Iterator[Metric]:
    runs, reports = known["runs"], known["reports"]
    yield "probes_total", "counter", "Probe runs.", _one(runs["total"])
    yield "probe_failures_total", "counter", "Probe runs that failed.", _one(runs["failed"])
    text = "Probe runs that could not be asked; not counted as failed."
    yield "probes_unable_total", "counter", text, _one(runs["unable"])
    yield "reports_total", "counter", "Reports accepted.", _one(reports["sent"])
    yield "report_failures_total", "counter", "Reports that failed.", _one(reports["failed"])
    text = "1 while reports are refused or not answered."
    yield "reports_in_trouble", "gauge", text, _one(int(bool(reports["trouble"])))
    yield "reports_dropped_total", "counter", "Reports dropped unsent.", _one(reports["dropped"])


def _optional(known: Status) -> Iterator[Metric]:
    if "repairs" in known:
        outcomes = [(f'{{outcome="{o}"}}', n) for o, n in known["repairs"]["outcomes"].items()]
        yield "repairs_total", "counter", "Repair attempts that have ended, by how.", outcomes
    if "escalations" in known:
        sent = known["escalations"]
        yield "escalations_open", "gauge", "Anomalies that are open.", _one(len(sent["open"]))
        text = "Escalations that a sink has accepted."
        yield "escalations_sent_total", "counter", text, _one(sent["sent"])
        text = "Escalations that a sink has refused, or not accepted in time."
        yield "escalations_failed_total", "counter", text, _one(sent["failed"])
        text = "Escalations dropped from a full queue."
        yield "escalations_dropped_total", "counter", text, _one(sent["dropped"])
    if "logs" in known:
        lines = known["logs"]
        text = "Lines accepted by Loki."
        yield "log_lines_shipped_total", "counter", text, _one(lines["shipped"])
        text = "Lines dropped unsent."
        yield "log_lines_dropped_total", "counter", text, _one(lines["dropped"])
        text = "Lines refused by Loki."
        yield "log_lines_refused_total", "counter", text, _one(lines["refused"])

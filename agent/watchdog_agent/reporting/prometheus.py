"""Prometheus text (https://prometheus.io/docs/instrumenting/exposition_formats/), by hand."""

from __future__ import annotations

from watchdog_agent import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from watchdog_agent.runtime.types import Document


def render(known: Document) -> bytes:
    """The metrics of an agent with this status. The device is the scrape's target; no label repeats it."""
    lines: list[str] = []

    def metric(name: str, kind: str, text: str, *values: tuple[str, object]) -> None:
        lines.append(f"# HELP watchdog_agent_{name} {text}")
        lines.append(f"# TYPE watchdog_agent_{name} {kind}")
        lines.extend(f"watchdog_agent_{name}{labels} {value}" for labels, value in values)

    metric("ready", "gauge", "1 when registered and probed once.", ("", int(known["ready"])))
    metric(
        "state",
        "gauge",
        "1 for the state that the device is believed to be in.",
        *((f'{{state="{s}"}}', int(s == known["state"])) for s in wire.STATES),
    )
    metric("epoch", "gauge", "The epoch that this agent carries.", ("", known["epoch"]))
    probes = known["probes"].items()
    metric(
        "probe_up",
        "gauge",
        "1 when the last result of a probe was good.",
        *((f'{{probe="{n}"}}', int(r["ok"])) for n, r in probes),
    )
    metric(
        "probe_unable",
        "gauge",
        "1 when the agent was unable to ask in the last run of a probe.",
        *((f'{{probe="{n}"}}', int(r["outcome"] == "unable")) for n, r in probes),
    )
    metric(
        "probe_warning",
        "gauge",
        "1 when a probe exceeds a warning threshold.",
        *((f'{{probe="{n}"}}', int("warning" in r)) for n, r in probes),
    )
    metric(
        "probe_seconds",
        "gauge",
        "Duration of the last run of a probe.",
        *((f'{{probe="{n}"}}', f"{r['took_s']:.6f}") for n, r in probes),
    )
    summaries = [(n, r["stats"]) for n, r in probes]
    metric(
        "probe_loss",
        "gauge",
        "Share of the last 60 runs of a probe that failed, 0 to 1.",
        *((f'{{probe="{n}"}}', s["loss"]) for n, s in summaries),
    )
    metric(
        "probe_latency_seconds",
        "gauge",
        "Duration of those of the last 60 runs of a probe that were good.",
        *(
            (f'{{probe="{n}",stat="{what}"}}', s[f"{what}_s"])
            for n, s in summaries
            for what in ("min", "mean", "p50", "p95", "max")
            if s["min_s"] is not None
        ),
    )
    runs = known["runs"]
    metric("probes_total", "counter", "Probe runs.", ("", runs["total"]))
    metric("probe_failures_total", "counter", "Probe runs that failed.", ("", runs["failed"]))
    metric(
        "probes_unable_total",
        "counter",
        "Probe runs that could not be asked; not counted as failed.",
        ("", runs["unable"]),
    )
    reports = known["reports"]
    metric("reports_total", "counter", "Reports accepted.", ("", reports["sent"]))
    metric("report_failures_total", "counter", "Reports that failed.", ("", reports["failed"]))
    metric(
        "reports_in_trouble",
        "gauge",
        "1 while reports are refused or not answered.",
        ("", int(bool(reports["trouble"]))),
    )
    metric("reports_dropped_total", "counter", "Reports dropped unsent.", ("", reports["dropped"]))
    if "repairs" in known:
        metric(
            "repairs_total",
            "counter",
            "Repair attempts that have ended, by how.",
            *((f'{{outcome="{o}"}}', n) for o, n in known["repairs"]["outcomes"].items()),
        )
    if "escalations" in known:
        escalations = known["escalations"]
        metric(
            "escalations_open", "gauge", "Anomalies that are open.", ("", len(escalations["open"]))
        )
        for name, text in (
            ("sent", "Escalations that a sink has taken."),
            ("failed", "Escalations that a sink has refused, or not taken in time."),
            ("dropped", "Escalations dropped from a full queue."),
        ):
            metric(f"escalations_{name}_total", "counter", text, ("", escalations[name]))
    if "logs" in known:
        logs = known["logs"]
        metric("log_lines_shipped_total", "counter", "Lines taken by Loki.", ("", logs["shipped"]))
        metric("log_lines_dropped_total", "counter", "Lines dropped unsent.", ("", logs["dropped"]))
        metric(
            "log_lines_refused_total", "counter", "Lines refused by Loki.", ("", logs["refused"])
        )
    return ("\n".join(lines) + "\n").encode()

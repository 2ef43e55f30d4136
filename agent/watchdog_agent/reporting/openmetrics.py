"""The metrics as OpenMetrics 1.0 (https://prometheus.io/docs/specs/om/open_metrics_spec/). Imported when a
scraper requests it."""

from __future__ import annotations

KIND = "application/openmetrics-text; version=1.0.0; charset=utf-8"


def wanted(accept: str) -> bool:
    """Whether an Accept header asks for OpenMetrics; with q=0 it does not."""
    for one in accept.lower().split(","):
        name, _, parameters = one.partition(";")
        if name.strip() == "application/openmetrics-text":
            weights = [p.strip() for p in parameters.split(";") if p.strip().startswith("q=")]
            return not weights or weights[0].strip("q=0.") != ""
    return False


def converted(text: bytes) -> bytes:
    """Convert text of `prometheus.render` to OpenMetrics: counter family names lose the _total suffix, and an end
    marker is added."""
    lines = text.decode().splitlines()
    counters = {
        words[2]
        for line in lines
        if line.startswith("# TYPE ") and (words := line.split())[3] == "counter"
    }
    return ("\n".join(_line(line, counters) for line in lines) + "\n# EOF\n").encode()


def _line(line: str, counters: set[str]) -> str:
    words = line.split(" ", 3)
    if not line.startswith("# ") or words[2] not in counters:
        return line
    return " ".join([*words[:2], words[2].removesuffix("_total"), *words[3:]])

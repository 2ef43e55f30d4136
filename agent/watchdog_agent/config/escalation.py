"""Validation of escalation, log shipping and stored state in the configuration document. Imported only if
a document has one of them."""

from __future__ import annotations

from watchdog_agent.config import optional_table, validators
from watchdog_agent.config.optional_table import GROUPS, MAX_SINKS, SINKS
from watchdog_agent.config.validators import check_list, check_url
from watchdog_agent.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from watchdog_agent.runtime.types import Document


def check(config: Document) -> None:
    """Fill in defaults. Raises ConfigError."""
    if config.get("state", "") not in ("", "consul"):
        raise ConfigError(f"state is {config['state']!r}; allowed is consul")
    prefix = config.get("prefix", "")
    if not isinstance(prefix, str) or prefix.strip(optional_table.NAME.allowed + "/"):
        raise ConfigError("prefix may hold letters, digits, _ . - and / only")
    if "loki" in config:
        _loki(config["loki"])
    if "escalate" in config:
        _escalate(config["escalate"], config)


def _escalate(rules: object, config: Document) -> None:
    if not isinstance(rules, dict):
        raise ConfigError("escalate must be an object")
    sinks = check_list(rules, "sinks")
    if not 0 < len(sinks) <= MAX_SINKS:
        raise ConfigError(f"escalate.sinks must have 1 to {MAX_SINKS} sinks")
    for sink in sinks:
        _sink(sink, config)
    rules.setdefault("by", list(GROUPS))
    for kind in check_list(rules, "by"):
        if kind not in GROUPS:
            raise ConfigError(f"escalate.by holds {kind!r}; allowed are {', '.join(GROUPS)}")
    validators.fill(rules, optional_table.Escalate, "escalate")


def _sink(sink: object, config: Document) -> None:
    if not isinstance(sink, dict) or sink.get("kind") not in SINKS:
        kind = sink.get("kind") if isinstance(sink, dict) else sink
        raise ConfigError(f"escalate.sinks: kind is {kind!r}; allowed are {', '.join(SINKS)}")
    if sink["kind"] != "consul_event" or sink.get("url"):
        check_url(sink.get("url"), "http:// or https:// address", tls=True)
    elif not config.get("consul"):
        raise ConfigError("escalate.sinks: consul_event needs a url, or consul in the document")
    if sink["kind"] == "consul_event":
        sink.setdefault("name", "watchdog-escalation")
        validators.fill(sink, optional_table.SinkTable, "escalate.sinks")
    _file(sink, "escalate.sinks")


def _loki(loki: object) -> None:
    if not isinstance(loki, dict):
        raise ConfigError("loki must be an object")
    check_url(loki.get("url"), "http:// or https:// address", tls=True)
    validators.fill(loki, optional_table.Loki, "loki")
    _file(loki, "loki")


def _file(holder: Document, where: str) -> None:
    if not isinstance(holder.get("token_file", ""), str):
        raise ConfigError(f"{where}: token_file must be the path of a file")

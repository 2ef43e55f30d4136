"""The rules of escalation, log shipping and kept state in the configuration document; imported only where
a document has one of them."""

from __future__ import annotations

from watchdog_agent.config import validators
from watchdog_agent.config.validators import check_list, check_url
from watchdog_agent.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from watchdog_agent.runtime.types import Config

SINKS = ("webhook", "alertmanager", "consul_event")
GROUPS = ("gateway", "site", "class", "host")
NAME = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")


def check(config: Config) -> None:
    """Fill in defaults. Raises ConfigError."""
    if config.get("state", "") not in ("", "consul"):
        raise ConfigError(f"state is {config['state']!r}; allowed is consul")
    prefix = config.get("prefix", "")
    if not isinstance(prefix, str) or not set(prefix) <= NAME | {"/"}:
        raise ConfigError("prefix may hold letters, digits, _ . - and / only")
    if "loki" in config:
        _loki(config["loki"])
    if "escalate" in config:
        _escalate(config["escalate"], config)


def _escalate(rules: Any, config: Config) -> None:
    if not isinstance(rules, dict):
        raise ConfigError("escalate must be an object")
    sinks = check_list(rules, "sinks")
    if not 0 < len(sinks) <= 8:
        raise ConfigError("escalate.sinks must hold 1 to 8 sinks")
    for sink in sinks:
        _sink(sink, config)
    rules.setdefault("by", list(GROUPS))
    for kind in check_list(rules, "by"):
        if kind not in GROUPS:
            raise ConfigError(f"escalate.by holds {kind!r}; allowed are {', '.join(GROUPS)}")
    validators.flag(rules, "degraded", False)
    validators.number(rules, "window_s", 30.0, 1.0, 3600.0)
    validators.number(rules, "gather_s", 2.0, 0.1, 600.0)
    validators.number(rules, "retry_s", 1.0, 0.1, 600.0)
    validators.number(rules, "give_up_s", 900.0, 1.0, 86400.0)
    validators.number(rules, "consul_wait_s", 10.0, 0.5, 600.0)
    validators.number(rules, "session_ttl_s", 10.0, 1.0, 86400.0)
    validators.number(rules, "note_s", 900.0, 1.0, 86400.0)


def _sink(sink: Any, config: Config) -> None:
    if not isinstance(sink, dict) or sink.get("kind") not in SINKS:
        kind = sink.get("kind") if isinstance(sink, dict) else sink
        raise ConfigError(f"escalate.sinks: kind is {kind!r}; allowed are {', '.join(SINKS)}")
    if sink["kind"] != "consul_event" or sink.get("url"):
        check_url(sink.get("url"), "http:// or https:// address", tls=True)
    elif not config.get("consul"):
        raise ConfigError("escalate.sinks: consul_event needs a url, or consul in the document")
    if sink["kind"] == "consul_event":
        name = sink.setdefault("name", "watchdog-escalation")
        if not isinstance(name, str) or not 0 < len(name) <= 64 or not set(name) <= NAME:
            raise ConfigError(
                f"escalate.sinks: name is {name!r}; allowed are letters, digits, _ . -"
            )
    _file(sink, "escalate.sinks")


def _loki(loki: Any) -> None:
    if not isinstance(loki, dict):
        raise ConfigError("loki must be an object")
    check_url(loki.get("url"), "http:// or https:// address", tls=True)
    tenant = loki.get("tenant", "")
    if not isinstance(tenant, str) or not set(tenant) <= NAME:
        raise ConfigError("loki.tenant may hold letters, digits, _ . - only")
    _file(loki, "loki")


def _file(holder: Config, where: str) -> None:
    if not isinstance(holder.get("token_file", ""), str):
        raise ConfigError(f"{where}: token_file must be the path of a file")

"""The part of the configuration that says what may be repaired; read only where it says something."""

from __future__ import annotations

import binascii

from watchdog_agent.config import validators
from watchdog_agent.config.probes import name_of
from watchdog_agent.errors import ConfigError
from watchdog_agent.runtime import address
from watchdog_agent.runtime import parsing as digits
from watchdog_agent.runtime.http import Url
from watchdog_agent.runtime.stdlib_light import json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

    from watchdog_agent.runtime.types import Config, Step

TARGETS: Final = {
    "interface": "interface",
    "http": "url",
    "mqtt": "topic",
    "unit": "unit",
    "command": "command",
    "wake": "mac",
    "plugin": "plugin",
}
"""Kind of step → the one setting that says on what it is done."""
WHEN: Final = ("suspect", "degraded", "offline")
MAX_TRIES: Final = 64
"""Attempts of one episode, so that the record of it is bounded."""


def check(config: Config) -> None:
    """Fill in the defaults of `repairs` and `repair_policy`. Raises ConfigError."""
    steps = config["repairs"]
    if not isinstance(steps, list) or len(steps) > 32:
        raise ConfigError("repairs must be a list of at most 32")
    config["repairs"] = [_step(step, config) for step in steps]
    seen = [step["id"] for step in config["repairs"]]
    if len(set(seen)) != len(seen):
        raise ConfigError("repairs: the same step stands there twice; give it tries instead")
    if sum(step["tries"] for step in config["repairs"]) > MAX_TRIES:
        raise ConfigError(f"repairs: the tries of all steps are more than {MAX_TRIES}")
    policy = config.setdefault("repair_policy", {})
    if not isinstance(policy, dict):
        raise ConfigError("repair_policy must be an object")
    validators.flag(policy, "dry_run", False)
    validators.number(policy, "accepted_beats", 4, 1, 1000)
    validators.number(policy, "alone_s", 86400.0, 0.0, 31_536_000.0)


def _step(step: Any, config: Config) -> Step:
    if not isinstance(step, dict) or step.get("kind") not in tuple(TARGETS):
        kind = step.get("kind") if isinstance(step, dict) else step
        raise ConfigError(f"repairs: kind is {kind!r}; allowed are {', '.join(TARGETS)}")
    validators.number(step, "budget", 3, 1, 1000)
    validators.number(step, "window_s", 3600.0, 0.1, 31_536_000.0)
    validators.number(step, "cooldown_s", 30.0, 0.0, 31_536_000.0)
    validators.number(step, "timeout_s", 10.0, 0.01, 600.0)
    validators.number(step, "verify_s", 30.0, 0.01, 86400.0)
    validators.number(step, "tries", 1, 1, 100)
    validators.flag(step, "dry_run", False)
    validators.flag(step, "even_behind_gateway", False)
    if step.setdefault("when", "suspect") not in WHEN:
        raise ConfigError(f"repairs: when is {step['when']!r}; allowed are {', '.join(WHEN)}")
    known = [name_of(probe) for probe in config["probes"]]
    if step.setdefault("probe", "") and step["probe"] not in known:
        raise ConfigError(f"repairs: probe is {step['probe']!r}; there are {', '.join(known)}")
    _target(step)
    step["name"] = _name_of(step)
    # What is done makes the identity, not the place in the list: a budget outlives a new order.
    does = {name: step.get(name) for name in ("kind", *TARGETS.values(), "broker", "method")}
    step["id"] = f"{step['kind']}-{binascii.crc32(json.dumps(does, sort_keys=True).encode()):08x}"
    return step


def _target(step: Step) -> None:
    kind = step["kind"]
    value = step.get(TARGETS[kind])
    where = f"repairs: {TARGETS[kind]} of {kind}"
    if kind == "command":
        if (
            not isinstance(value, list)
            or not 0 < len(value) <= 64
            or any(not isinstance(word, str) or "\0" in word for word in value)
            or not value[0]
        ):
            raise ConfigError(f"{where} must be a list of 1 to 64 texts")
        return
    if not isinstance(value, str) or not value or any(not "!" <= c <= "~" for c in value):
        raise ConfigError(f"{where} is {value!r}; it must be printable ASCII without blanks")
    _more(step, kind, where, value)


def _more(step: Step, kind: str, where: str, value: str) -> None:
    if kind == "http":
        try:
            Url(value, tls=True)
        except ValueError:
            raise ConfigError(f"{where} is {value!r}; it must be http:// or https://") from None
        if step.setdefault("method", "POST") not in ("GET", "POST"):
            raise ConfigError(f"repairs: method is {step['method']!r}; allowed are GET, POST")
    elif kind == "mqtt":
        validators.flag(step, "tls", False)
        _place(step, "broker", 8883 if step["tls"] else 1883)
        if step["tls"]:
            validators.check_trust(step, "repairs")
        if not isinstance(step.setdefault("payload", ""), str) or len(step["payload"]) > 1024:
            raise ConfigError("repairs: payload must be text of at most 1024 characters")
        if len(value) > 256 or "+" in value or "#" in value:
            raise ConfigError(f"{where} is at most 256 long and holds no + or #")
    elif kind == "wake":
        parts = value.split(":")
        digits = set("0123456789abcdefABCDEF")
        if len(parts) != 6 or any(len(p) != 2 or not set(p) <= digits for p in parts):
            raise ConfigError(f"{where} is {value!r}; it must be as 00:11:22:aa:bb:cc")
        step.setdefault("to", "255.255.255.255")
        _place(step, "to", 9)
    elif kind == "interface" and (len(value) > 15 or "/" in value):
        raise ConfigError(f"{where} is {value!r}; it must be the name of an interface")
    elif kind == "unit" and value.startswith("-"):
        raise ConfigError(f"{where} is {value!r}; it must be the name of a unit")


def _place(step: Step, name: str, default_port: int) -> None:
    """HOST or HOST:PORT → (host, port)."""
    value = step.get(name)
    host, _, port = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    if isinstance(value, str) and (":" not in value or address.literal(value)):
        host, port = value, str(default_port)
    try:
        number = digits.whole(port, 1, 65535)
    except ValueError:
        raise ConfigError(f"repairs: {name} is {value!r}; it must be HOST or HOST:PORT") from None
    step[f"{name}_at"] = (validators.host(host, f"repairs: {name}"), number)


def _name_of(step: Step) -> str:
    """As people see it. Arguments and paths may hold what is nobody's business."""
    kind, value = step["kind"], step[TARGETS[step["kind"]]]
    if kind == "http":
        value = value.partition("://")[2].partition("/")[0]
    elif kind == "command":
        value = value[0].rpartition("/")[2]
    return f"{kind} {ascii(value)[1:-1]}"[:80]

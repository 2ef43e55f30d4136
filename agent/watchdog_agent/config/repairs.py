"""Validation of `repairs` and `repair_policy`; loaded only if a document has repairs."""

from __future__ import annotations

import binascii

from watchdog_agent.config import optional_table, table, validators
from watchdog_agent.config.optional_table import MAX_TRIES, TARGETS
from watchdog_agent.config.probes import name_of
from watchdog_agent.errors import ConfigError
from watchdog_agent.runtime.http import Url
from watchdog_agent.runtime.stdlib_light import json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from watchdog_agent.runtime.types import Document, Probe, Step


def check(config: Document, probes: list[Probe]) -> None:
    """Fill in the defaults of `repairs` and `repair_policy`. Raises ConfigError."""
    steps = config["repairs"]
    if not isinstance(steps, list) or len(steps) > 32:
        raise ConfigError("repairs must be a list of at most 32")
    known = [name_of(probe) for probe in probes]
    checked = [_step(step, known) for step in steps]
    config["repairs"] = checked
    seen = [step["id"] for step in checked]
    if len(set(seen)) != len(seen):
        raise ConfigError("repairs: the same step stands there twice; give it tries instead")
    if sum(step["tries"] for step in checked) > MAX_TRIES:
        raise ConfigError(f"repairs: the tries of all steps are more than {MAX_TRIES}")
    policy = config.setdefault("repair_policy", {})
    if not isinstance(policy, dict):
        raise ConfigError("repair_policy must be an object")
    validators.fill(policy, optional_table.RepairPolicyTable, "repair_policy")


def _step(step: object, known: list[str]) -> Step:
    if not isinstance(step, dict) or step.get("kind") not in tuple(TARGETS):
        kind = step.get("kind") if isinstance(step, dict) else step
        raise ConfigError(f"repairs: kind is {kind!r}; allowed are {', '.join(TARGETS)}")
    validators.fill(step, optional_table.Repair, "repairs")
    if step.setdefault("probe", "") and step["probe"] not in known:
        raise ConfigError(f"repairs: probe is {step['probe']!r}; there are {', '.join(known)}")
    _target(step)
    step["name"] = _name_of(step)
    # The ID depends on the action, not on the position: its budget survives reordering.
    does = {name: step.get(name) for name in ("kind", *TARGETS.values(), "broker", "method")}
    step["id"] = f"{step['kind']}-{binascii.crc32(json.dumps(does, sort_keys=True).encode()):08x}"
    result: Step = validators.checked(step)
    return result


def _target(step: Document) -> None:
    kind = str(step["kind"])
    name = TARGETS[kind]
    if kind == "http":
        try:
            Url(str(step.get("url")), tls=True)
        except ValueError:
            text = f"repairs: url is {step.get('url')!r}; it must be http:// or https://"
            raise ConfigError(text) from None
        validators.fill(step, optional_table.RepairHttp, "repairs")
    else:
        validators.require(step, name, vars(optional_table.RepairTarget)[name], f"repairs: {kind}")
    if kind == "mqtt":
        _mqtt(step)
    elif kind == "wake":
        step.setdefault("to", "255.255.255.255")
        _place(step, "to", 9)


def _mqtt(step: Document) -> None:
    validators.fill(step, optional_table.Mqtt, "repairs")
    _place(step, "broker", table.MQTT_TLS_PORT if step["tls"] else table.PORTS["mqtt"])
    if step["tls"]:
        validators.check_trust(step, "repairs")
    payload = step.setdefault("payload", "")
    if not isinstance(payload, str) or len(payload) > 1024:
        raise ConfigError("repairs: payload must be text of at most 1024 characters")


def _place(step: Document, name: str, default_port: int) -> None:
    try:
        step[f"{name}_at"] = validators.place(step.get(name), default_port)
    except ValueError as error:
        raise ConfigError(f"repairs: {name}: {error}") from None


def _name_of(step: Document) -> str:
    """The name of a step, without arguments and paths, which may contain secrets."""
    kind = str(step["kind"])
    target = step[TARGETS[kind]]
    value = str(target)
    if kind == "http":
        value = value.partition("://")[2].partition("/")[0]
    elif isinstance(target, list):
        value = str(target[0]).rpartition("/")[2]
    return f"{kind} {ascii(value)[1:-1]}"[:80]

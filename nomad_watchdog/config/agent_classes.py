"""Settings of an agent class: probes, confirmations and repairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field, model_validator
from watchdog_agent.config.optional_table import (
    MAX_TRIES,
    TARGETS,
    Repair,
    RepairPolicyTable,
    RepairTarget,
)
from watchdog_agent.config.table import AgentTable
from watchdog_agent.config.validators import place
from watchdog_agent.detection.failure_detector import FailureDetector

from nomad_watchdog import __version__
from nomad_watchdog.config import escalation
from nomad_watchdog.config.escalation import EscalationSettings, LokiSettings
from nomad_watchdog.config.probes import ON_HOST, GatewaySettings, ProbeSettings
from nomad_watchdog.config.rollouts import RolloutStrategySettings
from nomad_watchdog.config.types import (
    Absolute,
    Block,
    Command,
    Duration,
    Host,
    Name,
    Phrase,
    Plugin,
    Positive,
    Seconds,
    Size,
    Text,
    Url,
    fitting,
    within,
)
from nomad_watchdog.units import show

REPAIR_EXTRAS: Final[Mapping[str, str]] = {
    "method": "http",
    "broker": "mqtt",
    "payload": "mqtt",
    "user": "mqtt",
    "password_file": "mqtt",
    "tls": "mqtt",
    "server_name": "mqtt",
    "ca_cert": "mqtt",
    "client_cert": "mqtt",
    "client_key": "mqtt",
    "to": "wake",
}
"""Setting → the only kind of repair that supports it."""
OVER_TLS: Final = ("server_name", "ca_cert", "client_cert", "client_key")


def checked_place(value: str) -> str:
    """HOST or HOST:PORT. Raises ValueError."""
    place(value, 1)
    return value


Place = Annotated[str, AfterValidator(checked_place)]


class RepairSettings(Block):
    """One step of a class's repair ladder, in the order of the file."""

    kind: Literal["interface", "http", "mqtt", "unit", "command", "wake", "plugin"]
    interface: Annotated[str, fitting(RepairTarget.interface)] | None = None
    url: Url | None = None
    method: Literal["GET", "POST"] | None = None
    topic: Annotated[str, fitting(RepairTarget.topic)] | None = None
    broker: Place | None = None
    payload: Text | None = None
    user: Phrase | None = None
    password_file: Absolute | None = None
    tls: bool | None = None
    server_name: Host | None = None
    ca_cert: Absolute | None = None
    client_cert: Absolute | None = None
    client_key: Absolute | None = None
    unit: Annotated[str, fitting(RepairTarget.unit)] | None = None
    command: Command | None = None
    mac: Annotated[str, fitting(RepairTarget.mac)] | None = None
    to: Place | None = None
    plugin: Plugin | None = None
    when: Literal["suspect", "degraded", "offline"] = "suspect"
    probe: Text | None = None
    tries: Annotated[int, within(Repair.tries)] = Repair.tries.default
    verify: Annotated[Duration, within(Repair.verify_s)] = Repair.verify_s.default
    dry_run: bool = Repair.dry_run.default
    even_behind_gateway: bool = Repair.even_behind_gateway.default
    budget: Annotated[int, within(Repair.budget)] = Repair.budget.default
    window: Annotated[Duration, within(Repair.window_s)] = Repair.window_s.default
    cooldown: Annotated[Duration, within(Repair.cooldown_s)] = Repair.cooldown_s.default
    timeout: Annotated[Duration, within(Repair.timeout_s)] = Repair.timeout_s.default

    @model_validator(mode="after")
    def _fits(self) -> RepairSettings:
        wanted = TARGETS[self.kind]
        for setting in TARGETS.values():
            if (getattr(self, setting) is not None) != (setting == wanted):
                raise ValueError(
                    f"{self.kind} needs {wanted}"
                    if setting == wanted
                    else f"{self.kind} knows no {setting}; it acts on {wanted}"
                )
        for setting, kind in REPAIR_EXTRAS.items():
            if getattr(self, setting) is not None and kind != self.kind:
                raise ValueError(f"{self.kind} knows no {setting}; {kind} does")
        if self.kind == "mqtt" and self.broker is None:
            raise ValueError("mqtt needs broker = HOST:PORT")
        self._check_tls()
        if self.timeout >= self.window:
            raise ValueError(
                f"timeout ({self.timeout:g}s) must be shorter than window ({self.window:g}s)"
            )
        return self

    def _check_tls(self) -> None:
        given = [one for one in OVER_TLS if getattr(self, one) is not None]
        if given and not self.tls:
            raise ValueError(f"{given[0]} needs tls = true")
        if self.client_key and not self.client_cert:
            raise ValueError("client_key needs client_cert")

    def wire(self) -> dict[str, object]:
        """The step in the agent's document, under `repairs`."""
        more = {name: getattr(self, name) for name in REPAIR_EXTRAS}
        more |= {"when": self.when, "probe": self.probe, "tries": self.tries}
        more |= {"verify_s": self.verify, "dry_run": self.dry_run}
        more["even_behind_gateway"] = self.even_behind_gateway
        # Omit defaults, so that a class from an older version keeps its hash.
        given = {k: v for k, v in more.items() if v is not None and _default(Repair, k) != v}
        return given | {
            "kind": self.kind,
            TARGETS[self.kind]: getattr(self, TARGETS[self.kind]),
            "budget": self.budget,
            "window_s": self.window,
            "cooldown_s": self.cooldown,
            "timeout_s": self.timeout,
        }


def _default(rules: type, name: str) -> object:
    return getattr(getattr(rules, name, None), "default", None)


class BackendOverrides(Block):
    """Replaces the template, driver, workload and variables of a class on one backend."""

    template: Text = ""
    driver: Name | None = None
    workload: Literal["deployment", "statefulset", "pod"] | None = None
    variables: dict[str, Text] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits(self) -> BackendOverrides:
        _once(self.driver, self.workload, self.variables)
        return self

    def filled(self) -> dict[str, str]:
        """All template variables, including driver and workload."""
        found = dict(self.variables)
        found |= {"driver": self.driver} if self.driver else {}
        return found | ({"workload": self.workload} if self.workload else {})


def _once(driver: str | None, workload: str | None, variables: Mapping[str, str]) -> None:
    for name, value in (("driver", driver), ("workload", workload)):
        if value and name in variables:
            raise ValueError(f"{name} is given twice: as a setting and in variables")


class AgentClassSettings(Block):
    template: Text = ""
    version: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$")] = __version__
    driver: Name | None = None
    workload: Literal["deployment", "statefulset", "pod"] | None = None
    cpu: Annotated[int, Field(ge=1, le=1_000_000)] = 50
    memory: Size = 64 * 1024 * 1024
    kill_timeout: Positive = 10.0
    variables: dict[str, Text] = Field(default_factory=dict)
    metadata: dict[str, Text] = Field(default_factory=dict)
    beat: Annotated[Duration, within(AgentTable.beat_s)] = AgentTable.beat_s.default
    ttl: Seconds | None = None
    probe: tuple[ProbeSettings, ...] = ()
    confirm: tuple[ProbeSettings, ...] = ()
    repair: tuple[RepairSettings, ...] = ()
    gateway: GatewaySettings | None = None
    escalate: EscalationSettings | None = None
    loki: LokiSettings | None = None
    state: Literal["folder", "consul"] = "folder"
    repair_dry_run: bool = RepairPolicyTable.dry_run.default
    repair_accepted_beats: Annotated[int, within(RepairPolicyTable.accepted_beats)] = (
        RepairPolicyTable.accepted_beats.default
    )
    repair_alone: Annotated[Duration, within(RepairPolicyTable.alone_s)] = (
        RepairPolicyTable.alone_s.default
    )
    on: dict[Name, BackendOverrides] = Field(default_factory=dict)
    rollout: RolloutStrategySettings | None = None

    def suspect_s(self) -> float:
        """Maximum time that an agent of this class can suspect its device, in seconds: each missed round of the
        slowest probe checks the gateway and the confirmations once (agent/README.md)."""
        asked_s = max((one.timeout for one in self.confirm), default=0.0)
        asked_s += 0.0 if self.gateway is None else self.gateway.timeout
        rounds = (
            (1 + (0.05 if one.jitter is None else one.jitter)) * one.interval
            + one.timeout
            + asked_s
            for one in self.probe
        )
        return FailureDetector.MAX_ROUNDS * max(rounds, default=0.0)

    def repairs_wire(self) -> dict[str, object]:
        """The repair keys of the agent's document; empty without repairs."""
        if not self.repair:
            return {}
        policy = {
            "dry_run": self.repair_dry_run,
            "accepted_beats": self.repair_accepted_beats,
            "alone_s": self.repair_alone,
        }
        given = {k: v for k, v in policy.items() if v != _default(RepairPolicyTable, k)}
        steps = {"repairs": [step.wire() for step in self.repair]}
        return steps | ({"repair_policy": given} if given else {})

    @model_validator(mode="after")
    def _fits(self) -> AgentClassSettings:
        if sum(step.tries for step in self.repair) > MAX_TRIES:
            raise ValueError(f"the tries of all repairs together may be {MAX_TRIES} at most")
        probes = {one.label for one in self.probe}
        for step in self.repair:
            if step.probe is not None and step.probe not in probes:
                raise ValueError(
                    f"repair.probe is {show(step.probe)}; the probes are {', '.join(sorted(probes))}"
                )
        same = {probe.kind for probe in self.probe} & {probe.kind for probe in self.confirm}
        if same:
            raise ValueError(f"confirm must be of another kind than probe; both have {min(same)}")
        on_host = {probe.kind for probe in self.confirm} & ON_HOST
        if on_host:
            raise ValueError(f"confirm must ask the device; {min(on_host)} need not")
        _once(self.driver, self.workload, self.variables)
        return self

    def alert_wire(self) -> dict[str, object]:
        """The escalation, log and state keys of the agent's document; empty if none is set."""
        return escalation.wire(self.escalate, self.loki, self.state)

    def needs_consul(self) -> str:
        """What the class lacks if agents have no Consul, as an error message; "" = nothing."""
        sinks = self.escalate.sink if self.escalate else ()
        if any(sink.kind == "consul_event" and sink.url is None for sink in sinks):
            return "consul_event needs a url where consul.agent_address is empty"
        return ""


def default_class() -> dict[str, AgentClassSettings]:
    return {
        "default": AgentClassSettings(
            probe=(ProbeSettings(kind="tcp", port=80),), confirm=(ProbeSettings(kind="icmp"),)
        )
    }

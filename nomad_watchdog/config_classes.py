"""The settings of an agent class: what is probed, how it is confirmed, what is repaired."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from nomad_watchdog import __version__, config_escalate
from nomad_watchdog.config_escalate import Escalate, Loki
from nomad_watchdog.config_probes import ON_HOST, Gateway, Probe
from nomad_watchdog.config_types import Block, Name, Positive, Seconds, Size, Text, Url

REPAIRS: Final[Mapping[str, str]] = {
    "interface": "interface",
    "http": "url",
    "unit": "unit",
    "command": "command",
    "wake": "mac",
}
"""Kind of repair → the one setting that says on what it is done."""


class Repair(Block):
    """One step of a class's ladder, in the order of the file."""

    kind: Literal["interface", "http", "unit", "command", "wake"]
    interface: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,14}$")] | None = None
    url: Url | None = None
    unit: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9:_.@-]{0,254}$")] | None = None
    command: Annotated[tuple[Text, ...], Field(min_length=1, max_length=64)] | None = None
    mac: Annotated[str, Field(pattern=r"^[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}$")] | None = None
    budget: Annotated[int, Field(ge=1, le=1000)] = 3
    window: Positive = 3600.0
    cooldown: Seconds = 30.0
    timeout: Positive = 10.0

    @model_validator(mode="after")
    def _fits(self) -> Repair:
        wanted = REPAIRS[self.kind]
        for setting in REPAIRS.values():
            if (getattr(self, setting) is not None) != (setting == wanted):
                raise ValueError(
                    f"{self.kind} needs {wanted}"
                    if setting == wanted
                    else f"{self.kind} knows no {setting}; it acts on {wanted}"
                )
        if self.timeout >= self.window:
            raise ValueError(
                f"timeout ({self.timeout:g}s) must be shorter than window ({self.window:g}s)"
            )
        return self

    def wire(self) -> dict[str, Any]:
        """As the agent's document says it, under `repairs`."""
        return {
            "kind": self.kind,
            REPAIRS[self.kind]: getattr(self, REPAIRS[self.kind]),
            "budget": self.budget,
            "window_s": self.window,
            "cooldown_s": self.cooldown,
            "timeout_s": self.timeout,
        }


class AgentClass(Block):
    template: Text = ""
    version: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$")] = __version__
    driver: Name | None = None
    cpu: Annotated[int, Field(ge=1, le=1_000_000)] = 50
    memory: Size = 64 * 1024 * 1024
    kill_timeout: Positive = 10.0
    variables: dict[str, Text] = Field(default_factory=dict)
    metadata: dict[str, Text] = Field(default_factory=dict)
    beat: Positive = 15.0
    ttl: Seconds | None = None
    probe: tuple[Probe, ...] = ()
    confirm: tuple[Probe, ...] = ()
    repair: tuple[Repair, ...] = ()
    gateway: Gateway | None = None
    escalate: Escalate | None = None
    loki: Loki | None = None
    state: Literal["folder", "consul"] = "folder"

    @model_validator(mode="after")
    def _fits(self) -> AgentClass:
        same = {probe.kind for probe in self.probe} & {probe.kind for probe in self.confirm}
        if same:
            raise ValueError(f"confirm must be of another kind than probe; both have {min(same)}")
        on_host = {probe.kind for probe in self.confirm} & ON_HOST
        if on_host:
            raise ValueError(f"confirm must ask the device; {min(on_host)} need not")
        if self.driver and "driver" in self.variables:
            raise ValueError("driver is given twice: as a setting and in variables")
        return self

    def telling(self) -> dict[str, Any]:
        """What the agent's document says of whom it tells; empty for a class without."""
        return config_escalate.wire(self.escalate, self.loki, self.state)

    def needs_consul(self) -> str:
        """What is missing where agents have no Consul, in words; "" when nothing is."""
        sinks = self.escalate.sink if self.escalate else ()
        if any(sink.kind == "consul_event" and sink.url is None for sink in sinks):
            return "consul_event needs a url where consul.agent_address is empty"
        return ""


def default_class() -> dict[str, AgentClass]:
    return {
        "default": AgentClass(probe=(Probe(kind="tcp", port=80),), confirm=(Probe(kind="icmp"),))
    }

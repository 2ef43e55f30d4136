"""Settings of a class for escalation, log shipping, and where agents keep their state."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from watchdog_agent.config import optional_table
from watchdog_agent.config.optional_table import Escalate

from nomad_watchdog.config.types import Block, Duration, Text, Url, fitting, within


class SinkSettings(Block):
    """One receiver of escalations."""

    kind: Literal["webhook", "alertmanager", "consul_event"]
    url: Url | None = None
    token_file: Text = ""
    name: Annotated[str, fitting(optional_table.NAME)] | None = None

    @model_validator(mode="after")
    def _fits(self) -> SinkSettings:
        if self.kind != "consul_event" and self.url is None:
            raise ValueError(f"{self.kind} needs a url")
        if self.kind != "consul_event" and self.name is not None:
            raise ValueError(f"{self.kind} knows no name; consul_event does")
        return self

    def wire(self) -> dict[str, object]:
        """The receiver in the agent's document. Unset values are omitted: the agent has its own defaults."""
        given = {"url": self.url, "token_file": self.token_file, "name": self.name}
        return {"kind": self.kind} | {name: value for name, value in given.items() if value}


class EscalationSettings(Block):
    """When the agents of a class escalate on their own, and how they group escalations."""

    sink: Annotated[
        tuple[SinkSettings, ...], Field(min_length=1, max_length=optional_table.MAX_SINKS)
    ]
    degraded: bool = Escalate.degraded.default
    by: Annotated[tuple[Literal["gateway", "site", "class", "host"], ...], Field(max_length=4)] = (
        "gateway",
        "site",
        "class",
        "host",
    )
    window: Annotated[Duration, within(Escalate.window_s)] = Escalate.window_s.default
    gather: Annotated[Duration, within(Escalate.gather_s)] = Escalate.gather_s.default
    retry: Annotated[Duration, within(Escalate.retry_s)] = Escalate.retry_s.default
    give_up: Annotated[Duration, within(Escalate.give_up_s)] = Escalate.give_up_s.default
    consul_wait: Annotated[Duration, within(Escalate.consul_wait_s)] = (
        Escalate.consul_wait_s.default
    )
    session_ttl: Annotated[Duration, within(Escalate.session_ttl_s)] = (
        Escalate.session_ttl_s.default
    )

    @model_validator(mode="after")
    def _fits(self) -> EscalationSettings:
        if self.gather > self.window:
            raise ValueError(
                f"gather ({self.gather:g}s) must not be longer than window ({self.window:g}s)"
            )
        return self

    def wire(self) -> dict[str, object]:
        """The value of `escalate` in the agent's document."""
        # Omitted if not set, so that a class without it keeps its hash and its agents.
        more = {"degraded": True} if self.degraded else {}
        return more | {
            "sinks": [sink.wire() for sink in self.sink],
            "by": list(self.by),
            "window_s": self.window,
            "gather_s": self.gather,
            "retry_s": self.retry,
            "give_up_s": self.give_up,
            "consul_wait_s": self.consul_wait,
            "session_ttl_s": self.session_ttl,
        }


class LokiSettings(Block):
    """Where the agents send their log lines, in addition to standard error."""

    url: Url
    token_file: Text = ""
    tenant: Annotated[str, fitting(optional_table.NAME)] | None = None

    def wire(self) -> dict[str, object]:
        """The value of `loki` in the agent's document."""
        given: dict[str, object] = {"token_file": self.token_file, "tenant": self.tenant}
        return {"url": self.url} | {name: value for name, value in given.items() if value}


def wire(
    escalate: EscalationSettings | None, loki: LokiSettings | None, state: str
) -> dict[str, object]:
    """Keys of the agent's document. Empty for a class without these settings, so that it keeps its hash and its
    agents."""
    out: dict[str, object] = {}
    if escalate is not None:
        out["escalate"] = escalate.wire()
    if loki is not None:
        out["loki"] = loki.wire()
    if state == "consul":
        out["state"] = state
    return out

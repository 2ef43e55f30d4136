"""Types, for type checkers only.

Not imported at run time: `typing` alone would need 0.7 MB per device (bench/agent.py).
"""

from __future__ import annotations

import io
import os
import socket
import ssl
from collections.abc import Callable
from typing import Any, NotRequired, Protocol, Required, TypeAlias, TypedDict

Document: TypeAlias = dict[str, object]
"""A JSON object that is sent or stored, or that is not checked yet."""


class Follower(Protocol):
    """Reads the bytes appended to a file."""

    file: io.FileIO | None

    def appended(self, facts: os.stat_result, overlap: int) -> tuple[bytes, int]: ...
    def peek(self) -> Follower: ...


class TlsTrust(Protocol):
    """Provides the TLS context, reloaded when its files change."""

    def now(self) -> ssl.SSLContext: ...


class Probe(TypedDict, total=False):
    """One checked probe of the configuration; `config.table` defines the settings of each kind."""

    kind: Required[str]
    interval_s: Required[float]
    timeout_s: Required[float]
    misses: Required[int]
    jitter: Required[float]
    min_interval_s: Required[float]
    port: int
    address: str
    path: str
    expect_status: int | list[int]
    expect_body: str
    warn_time_s: float
    warn_loss: float
    warn_days: float
    name: str
    server: str
    type: str
    expect_address: str
    command: list[str]
    file: str
    expect_text: str
    forbid_text: str
    max_age_s: float
    follower: Follower
    tls: bool
    verify: bool
    ca_cert: str
    client_cert: str
    client_key: str
    server_name: str
    trust: TlsTrust
    user: str
    password_file: str
    community_file: str
    plugin: str
    settings: dict[str, object]
    instead: int
    """The TCP port that an ICMP probe connects to instead, where ICMP is not permitted."""
    level: int
    """The MQTT protocol level that the broker accepts."""


class Step(TypedDict, total=False):
    """One checked step of `repairs`."""

    id: Required[str]
    name: Required[str]
    kind: Required[str]
    when: Required[str]
    probe: Required[str]
    budget: Required[int]
    window_s: Required[float]
    cooldown_s: Required[float]
    timeout_s: Required[float]
    verify_s: Required[float]
    tries: Required[int]
    dry_run: Required[bool]
    even_behind_gateway: Required[bool]
    interface: str
    url: str
    method: str
    topic: str
    payload: str
    broker_at: tuple[str, int]
    tls: bool
    user: str
    password_file: str
    server_name: str
    trust: TlsTrust
    unit: str
    command: list[str]
    mac: str
    to_at: tuple[str, int]
    plugin: str
    level: int


class RepairPolicy(TypedDict):
    """The settings of all steps."""

    dry_run: bool
    accepted_beats: int
    alone_s: float


class SinkSpec(TypedDict, total=False):
    """One escalation sink."""

    kind: Required[str]
    url: str
    token_file: str
    name: str


class EscalateRules(TypedDict):
    """The checked block `escalate`."""

    sinks: list[SinkSpec]
    by: list[str]
    degraded: bool
    window_s: float
    gather_s: float
    retry_s: float
    give_up_s: float
    consul_wait_s: float
    session_ttl_s: float
    note_s: float


class LokiSpec(TypedDict, total=False):
    """The checked block `loki`."""

    url: Required[str]
    token_file: str
    tenant: str


class TlsSpec(TypedDict, total=False):
    """The checked block `consul_tls`."""

    server_name: str
    trust: Required[TlsTrust]


class Config(TypedDict, total=False):
    """The checked configuration document (see `wire`)."""

    device_id: Required[str]
    slug: Required[str]
    epoch: Required[int]
    address: Required[str]
    beat_s: Required[float]
    register_every_s: Required[float]
    probes: Required[list[Probe]]
    confirm: Required[list[Probe]]
    labels: dict[str, str]
    agent_class: str
    version: str
    spec_hash: str
    service: str
    check_interval: str
    api: list[str]
    ca_cert: str
    credential: str
    consul: str
    consul_tls: TlsSpec
    repairs: list[Step]
    repair_policy: RepairPolicy
    escalate: EscalateRules
    loki: LokiSpec
    state: str
    prefix: str
    gateway: Probe


class Attempt(TypedDict):
    """One attempt of a repair step. Times are seconds of the monotonic clock."""

    number: int
    id: str
    name: str
    episode: int
    at: float
    ended: float
    verify_s: float
    outcome: str
    reason: str
    asked: NotRequired[bool]
    """Whether a probe could be run while the step was verified."""


class Undo(TypedDict):
    """The data that undoes an interface's cycle."""

    kind: str
    interface: str
    kept: list[str]


class EscalationEntry(TypedDict):
    """One open escalation of this agent."""

    key: str
    id: str
    at: float
    summary: str
    evidence: Document
    group: list[str] | None
    episode: str
    told: bool
    ended: NotRequired[bool]
    """Whether its end was sent too. In memory only."""


class GroupAlert(TypedDict):
    """The alert of a group of agents (see `escalation.election`)."""

    episode: str
    rev: int
    state: str
    at: float
    ids: list[str]
    members: list[list[str]]


class Alert(TypedDict):
    """The alert that a sink sends (see `escalation.sinks`)."""

    key: str
    kind: str
    status: str
    episode: str
    rev: int
    at: float
    now: float
    group: list[str] | None
    scope: list[str] | None
    count: int
    devices: list[list[str]]
    summary: str
    evidence: Document
    uncoordinated: bool


class DetectorState(TypedDict):
    """The stored part of the failure detector. `since`: seconds since 1970."""

    was_ready: bool
    state: str
    reason: str
    misses: int
    since: int


class SavedState(DetectorState):
    """The stored state of an agent, in a file or in Consul."""

    device_id: str
    sequence: int
    escalations: NotRequired[list[EscalationEntry]]
    repairs: NotRequired[Document]


class KvEntry(TypedDict):
    """One key of Consul's KV store with its decoded value."""

    name: str
    value: object
    session: str
    index: int


Timer: TypeAlias = list[Any]
"""[time, sequence, callback or None]: a list, because the heap compares it and cancelling changes it."""
Watched: TypeAlias = socket.socket | io.FileIO
"""Objects that the loop can wait for: a socket, or a pipe or pidfd with its own `close`."""
Address: TypeAlias = tuple[str, int]
Outcome: TypeAlias = bool | None
"""Outcome of a probe: True success, False miss, None unable (see `outcome`)."""


class Ended(Protocol):
    """Called at the end of a probe or repair step with ok and reason. `warning`: description of the threshold that a
    success exceeds. A reason that is an `outcome.Unable` makes a failed probe unable instead of a miss."""

    def __call__(self, ok: bool, reason: str, warning: str = "", /) -> None: ...


class PluginAnswer(Protocol):
    """Called by a plugin at its end. `ok`: True = success, False = failure, None = unable to probe."""

    def __call__(self, ok: bool | None, reason: str = "", /) -> None: ...


class PluginLoop(Protocol):
    """The loop that plugins use. An exception in a callback ends the plugin, not the agent."""

    def later(self, delay_s: float, callback: Callable[[], None], /) -> Timer:
        """Call `callback` after this time."""
        ...

    def watch(self, sock: Watched, events: int, callback: Callable[[int], None], /) -> None:
        """Call `callback` with the events whenever the socket has any of them."""
        ...

    def forget(self, sock: Watched, /) -> None:
        """Stop watching the socket, and close it."""
        ...


class Cancellable(Protocol):
    """A repair step in progress."""

    def cancel(self) -> object:
        """Cancel it; `ended` is not called afterwards."""
        ...


class ProbePlugin(Protocol):
    """An entry point of the group `watchdog_agent.probes`: returns at once, and calls `ended` later."""

    def __call__(
        self,
        loop: PluginLoop,
        settings: dict[str, object],
        address: str,
        timeout_s: float,
        ended: PluginAnswer,
        /,
    ) -> object: ...


class RepairPlugin(Protocol):
    """An entry point of the group `watchdog_agent.repairs`: returns at once, and calls `ended` once."""

    def __call__(
        self,
        loop: PluginLoop,
        step: dict[str, object],
        device: dict[str, object],
        ended: PluginAnswer,
        /,
    ) -> Cancellable | None: ...


Probed: TypeAlias = Callable[[Outcome, str, float, str], None]
"""outcome, reason, seconds taken, warning"""
Fetched: TypeAlias = Callable[[int | None, dict[str, str], bytes, str], None]
"""status, headers, body, ""; or None, {}, b"", the reason"""
SockAddr: TypeAlias = tuple[str, int] | tuple[str, int, int, int]
"""A socket address of IPv4 or IPv6."""
Answer: TypeAlias = tuple[int, str, bytes]
"""status, content type, body"""
Log: TypeAlias = Callable[[str], None]
Decision: TypeAlias = tuple[str, Step | None, float | None, str]
"""action, step, when to decide again, reason"""

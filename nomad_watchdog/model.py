"""The data types that all layers use, from the API to the schedulers. Frozen, without I/O, cheap to compare.

docs/architecture.md defines the terms: a placement is one run of a device's agent as a scheduler sees it; the epoch
increases by one with each, and the agent that has the registry's epoch is the accepted one (S1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, NewType

from nomad_watchdog.host_pressure import HostPressure
from nomad_watchdog.ids import DeviceId, Slug

Monotonic = NewType("Monotonic", float)
"""Seconds of a clock that never jumps; only differences are meaningful."""

WallTime = NewType("WallTime", float)
"""Seconds since 1970 UTC; may jump, so it is displayed and stored, but no decision depends on a difference."""

Epoch = NewType("Epoch", int)
"""0 = never placed; each new placement of the device has the next number."""

NEVER: Final = Epoch(0)


class ConditionState(StrEnum):
    """What can be wrong with a device itself."""

    OFFLINE = "offline"
    DEGRADED = "degraded"


MAX_REASON: Final = 300
"""Maximum length of the reason of a condition, characters."""


@dataclass(frozen=True, slots=True)
class Condition:
    """What is wrong with a device, as an accepted agent reported it. It is stored in the registry, so it survives the
    agent, the control plane and the holder of the shard."""

    state: ConditionState
    since: WallTime
    """When the state began, unix seconds."""
    reason: str
    """The evidence in words, at most MAX_REASON characters."""
    misses: int = 0
    """Consecutive misses that the agent had counted."""


class Presence(StrEnum):
    """The desired state of a device in the registry."""

    PRESENT = "present"
    ABSENT = "absent"


class Departure(StrEnum):
    """How a device left. Only a removal is final; after the others its agent is kept for the grace period."""

    REMOVED = "removed"
    DISCONNECTED = "disconnected"  # a gateway reported it
    EXPIRED = "expired"  # no heartbeat for its ttl; a heartbeat brings it back


@dataclass(frozen=True, slots=True)
class Device:
    """What is watched."""

    id: DeviceId
    agent_class: str
    address: str
    """Host name or IP address that probes use; data, never part of a name or a command."""
    labels: Mapping[str, str] = field(default_factory=dict)
    ttl_s: float | None = None
    """It has left if no heartbeat arrives within this time; 0 = never, None = as configured for its class."""


@dataclass(frozen=True, slots=True)
class DeviceRecord:
    """The durable record of a device. Written by compare-and-set only, and only when it changes."""

    slug: Slug
    device: Device
    presence: Presence
    generation: int
    """Increases with each change of the desired state (register, change, deregister)."""
    epoch: Epoch
    """Survives delete and re-add: an absent record is a tombstone that keeps it."""
    instance: str
    """The one instance accepted at this epoch; empty until its first report (S1)."""
    changed_at: WallTime
    """When the desired state last changed."""
    index: int = 0
    """The store's compare-and-set token of this record; 0 = not stored yet."""
    event_at: int = 0
    """When the last signed event was signed, unix seconds of its sender's clock, even if it changed nothing; 0 = the
    record was last changed in another way (`core.event_order`)."""
    event_marks: tuple[str, ...] = ()
    """Marks of the events that were signed at `event_at`."""
    source: str = ""
    """The static inventory that lists it (`inventory:FILE`); "" = registered through the API."""
    left: Departure = Departure.REMOVED
    """Of a tombstone: how the device left. Ignored while it is present."""
    home: str = ""
    """The scheduler of the placement of this epoch (`core.migration`); "" = the one before the first migration."""
    condition: Condition | None = None
    """What is wrong with the device (`core.device_condition`); None = nothing, as far as known."""


class PlacementState(StrEnum):
    """State of one run of an agent in its scheduler. Only DEAD means that no process can be left."""

    PENDING = "pending"  # requested, not on any node yet
    STARTING = "starting"  # on a node, no process yet
    RUNNING = "running"
    RESTARTING = "restarting"  # the scheduler is handling a failure by itself
    STOPPING = "stopping"  # being stopped, a process may be left
    LOST = "lost"  # its node does not answer: a process may be left
    DEAD = "dead"  # every allocation is client-terminal; none will be started


@dataclass(frozen=True, slots=True)
class Placement:
    """One run of an agent."""

    slug: Slug
    device_id: DeviceId
    epoch: Epoch
    agent_class: str
    spec_hash: str
    state: PlacementState
    ref: str
    """The scheduler's own handle, such as a job ID; opaque outside its backend."""
    instances: tuple[str, ...] = ()
    """IDs of the runs that may have a process now, such as allocation IDs."""
    node: str = ""
    restarts: int = 0
    reason: str = ""
    """Why it is pending, restarting, lost or dead; if it is running: why it will not stay."""
    created_at: WallTime = WallTime(0.0)
    ready: bool | None = None
    """Result of the scheduler's own readiness probe; None = it has none."""
    backend: str = ""
    """The scheduler that has it; "" = the configured one."""
    waits_since: WallTime = WallTime(0.0)
    """When the job was submitted, or its newest allocation or pod created, by the scheduler's clock. 0 = not known."""
    queued: bool = False
    """No node has it: none has room now, or the scheduler has not decided yet. The next epoch would wait as well."""
    source: str = ""
    """URL below a replica's address that the agent is fetched from when it starts; "" = none, or not known."""
    api: tuple[str, ...] = ()
    """Addresses that it was started with, to send its reports to; () = not known."""
    node_id: str = ""
    """ID of its node, where several can have one name; "" = the name is unique, or no node has this epoch yet."""


@dataclass(frozen=True, slots=True)
class Variant:
    """What a class is on one scheduler, in place of its own template and variables."""

    template: str = ""
    text: str = field(default="", repr=False)
    """As `AgentSpec.text`."""
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AgentSpec:
    """Everything that a scheduler needs to run the agents of one class. Equal hash = equal behaviour."""

    agent_class: str
    version: str
    spec_hash: str
    """Over the template, version, resources, probes and repairs of the class."""
    template: str = ""
    """Backend template: a built-in name or a path; empty = the backend's default."""
    text: str = field(default="", repr=False)
    """Text of a template that is a file, for replicas without it; "" = built in, or read when it is used."""
    cpu_mhz: int = 50
    memory_bytes: int = 64 * 1024 * 1024
    kill_timeout_s: float = 10.0
    variables: Mapping[str, str] = field(default_factory=dict)
    """Variables for the template, from the configuration, never from a device."""
    on: Mapping[str, Variant] = field(default_factory=dict)
    """By scheduler, how the class differs there."""
    settings: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    """The settings that the hash covers, as text by dotted name (`config.settings_text`), to display changes; "#..."
    stands for a hidden value."""
    agent_config: Mapping[str, object] = field(default_factory=dict, repr=False)
    """The class part of the agent's document, as JSON values; `schedulers.agent_document` adds the device's part. It
    contains no secret as configured; `credentialed` adds the token of a single agent for its start."""
    avoid: tuple[str, ...] = field(default=(), compare=False)
    """Hosts that this start should avoid (`Capabilities.steers`). Never stored."""
    agent_file: str = field(default="", compare=False)
    """SHA-256 of the agent file (`agent_zipapp`); "" = that of this control plane. Never stored."""


@dataclass(frozen=True, slots=True)
class Health:
    """Health of the accepted agent of a device in Consul. It does not prove that the agent exists."""

    status: str  # passing | warning | critical
    epoch: Epoch = NEVER
    node: str = ""
    address: str = ""
    output: str = ""


class AgentState(StrEnum):
    """State of a device as its agent reports it."""

    OK = "ok"
    SUSPECT = "suspect"
    DEGRADED = "degraded"
    REPAIRING = "repairing"
    OFFLINE = "offline"
    UNABLE = "unable"
    """The agent can't probe: its resolver, routes, permissions or file descriptors prevent it."""


@dataclass(frozen=True, slots=True)
class RepairAttempt:
    """One step of a repair ladder, as its agent reports it (watchdog_agent.wire)."""

    number: int
    """Increases by one with each attempt of a device's ladder; 0 = not reported."""
    step: str
    outcome: str
    reason: str
    age_s: float


@dataclass(frozen=True, slots=True)
class Repairs:
    """State of a repair ladder, as its agent reports it."""

    active: str = ""
    """The step in progress, in words."""
    exhausted: bool = False
    """No step is left, and that was escalated."""
    dry_run: bool = False
    attempts: tuple[RepairAttempt, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """A report of an agent, checked."""

    device_id: DeviceId
    slug: Slug
    epoch: Epoch
    instance: str
    sequence: int
    """Increases with each report of an instance."""
    ready: bool
    state: AgentState
    was_ready: bool
    """The device answered this agent, or an earlier one, at least once (S6)."""
    misses: int
    confirmed: bool
    """A second, independent kind of probe failed, too (S6)."""
    reason: str
    listen: str
    """Host and port where the agent listens."""
    version: str
    dropped: int = 0
    """Reports that the agent has discarded since its start."""
    stopping: bool = False
    repairs: Repairs | None = None
    """None = its class has no repairs, or the agent is an older version."""
    gateway: str = ""
    """Address of the device's gateway; empty if the agent knows of none."""
    gateway_dead: bool = False
    state_age_s: float = 0.0
    """Duration of the state when it was reported, seconds, by the agent's clock; 0 = it has just begun, or the agent is
    an older version."""
    pressure: HostPressure | None = None
    received_at: Monotonic = Monotonic(0.0)
    """When this control plane accepted it."""


class VerdictState(StrEnum):
    WATCHED = "watched"
    STARTING = "starting"
    UNWATCHED = "unwatched"
    SUSPECT = "suspect"
    DEGRADED = "degraded"
    REPAIRING = "repairing"
    OFFLINE = "offline"
    FAILING = "failing"
    DEPARTED = "departed"


class Unheard(StrEnum):
    """Why there is no accepted report of a running agent."""

    REFUSED = "refused"
    """The API refuses its reports."""
    SILENT = "silent"
    """No report arrives."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The state of a device as users see it."""

    state: VerdictState
    reason: str
    ready: bool = False
    """Whether the accepted agent is ready, whatever it reports about the device."""
    decides: bool = False
    """Whether it is based on a fresh report of the accepted agent about the device. Otherwise the condition of the
    device stays as it is."""
    suspected: bool = False
    """The report is a suspicion, even if it has lasted so long that the verdict is another one."""
    unheard: Unheard | None = None
    """Why a running agent has no accepted report; None = it has one, or it is too early to expect one."""
    unlisted: bool = False
    """It is based on an agent that its scheduler does not list: an old process that would never be stopped."""
    agent: VerdictState | None = None
    """If `state` is the stored condition of the device: the verdict without it."""


@dataclass(frozen=True, slots=True)
class PresenceRules:
    """When a device has left, and for how long its agent is kept after that. Seconds are float."""

    ttl_s: float = 0.0
    """Of a device that has none itself or by its class; 0 = it stays until it is deregistered."""
    class_ttl_s: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Agent class → its own default, instead of `ttl_s`."""
    grace_s: float = 0.0
    """Time for which the agent of a device that expired or was disconnected is kept."""
    flap_changes: int = 6
    """Number of changes of presence close together that count as flapping; 0 disables flap detection."""
    flap_half_life_s: float = 300.0
    """Time after which a change counts half."""

    def ttl_of(self, device: Device) -> float:
        """Seconds; 0 = unlimited."""
        if device.ttl_s is not None:
            return device.ttl_s
        return self.class_ttl_s.get(device.agent_class, self.ttl_s)


@dataclass(frozen=True, slots=True)
class Limits:
    """How far and how fast the planner and the reconciler may go. Seconds are float."""

    breaker_min: int = 5
    """S7: maximum number of agents that a pass stops without confirmation …"""
    breaker_fraction: float = 0.10
    """… or this share of the running ones, if that is more."""
    replace_at_once: int = 5
    """Maximum number of devices that a roll-out has between two versions at a time …"""
    replace_fraction: float = 0.10
    """… or this share of the fleet, if that is more."""
    soak_s: float = 0.0
    """Time that agents of a new version must be ready to prove it; 0 = versions need no proof."""
    soak_deaths: int = 3
    """Number of devices whose agent ended before that after which the version is given up."""
    kill_grace_s: float = 10.0
    startup_grace_s: float = 60.0
    """A younger agent that is not ready is starting. Used until starts have been measured (`core.startup_grace`)."""
    startup_grace_min_s: float = 15.0
    startup_grace_max_s: float = 900.0
    """Limits of the measured value."""
    heartbeat_fresh_s: float = 15.0
    """A device with a younger heartbeat is not offline, whatever its agent reports."""
    report_stale_s: float = 45.0
    """Age at which the last report no longer counts (3 report intervals of 15 s)."""
    suspect_max_s: float = 120.0
    """Maximum duration of a suspicion that its agent neither confirms nor refutes."""
    repairing_max_s: float = 900.0
    """Maximum time that one repair may hide the state of a device."""
    start_max_s: float = 180.0
    """Maximum time without progress towards a running agent (`core.stuck_placements`); 0 = left to the scheduler."""
    incident_min: int = 3
    """Number of devices of a gateway, host, site or class that become unhealthy within the window in one incident …"""
    incident_fraction: float = 0.20
    """… or this share of them, if that is more."""
    incident_window_s: float = 60.0
    crash_loop_restarts: int = 5
    backoff_initial_s: float = 1.0
    backoff_max_s: float = 300.0
    starts_per_hour: int = 20
    """Maximum for one device (S9)."""
    concurrency: int = 16
    """Maximum number of concurrent calls to the scheduler (Nomad allows 100 connections per client)."""
    resync_s: float = 30.0
    """Maximum time between two full snapshots."""
    tombstone_ttl_s: float = 604_800.0
    """Time for which the record of a device that has left is kept (`core.tombstones`)."""
    presence: PresenceRules = PresenceRules()
    leaves: frozenset[str] = frozenset({"draining"})
    """The closed hosts that agents leave (`core.node_drain`): those that are draining, ineligible or cordoned."""

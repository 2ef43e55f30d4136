"""The values that flow from the door to the scheduler. Frozen, without I/O, cheap to compare.

Words are those of docs/architecture.md: a device is watched; a placement is one run of its agent as a
scheduler sees it; the epoch goes up by one for each new placement, and the agent that carries the
registry's epoch is the accepted one (S1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, NewType

from nomad_watchdog.ids import DeviceId, Slug

Monotonic = NewType("Monotonic", float)
"""Seconds of a clock that never jumps; only differences mean something."""

WallTime = NewType("WallTime", float)
"""Seconds since 1970 UTC; may jump, so it is shown and stored but never subtracted to decide."""

Epoch = NewType("Epoch", int)
"""0 = never placed; each new placement of the device takes the next number."""

NEVER: Final = Epoch(0)


class ConditionState(StrEnum):
    """What can be wrong with a device itself."""

    OFFLINE = "offline"
    DEGRADED = "degraded"


MAX_REASON: Final = 300
"""Characters of the reason of a condition."""


@dataclass(frozen=True, slots=True)
class Condition:
    """What is wrong with a device, as an accepted agent reported it. It belongs to the device: it is kept in
    the registry, and outlives the agent, the control plane and the holder of the shard."""

    state: ConditionState
    since: WallTime
    """When the state began, unix seconds."""
    reason: str
    """The evidence in words, at most MAX_REASON characters."""
    misses: int = 0
    """Consecutive misses that the agent had counted."""


class Presence(StrEnum):
    """What the registry asks for."""

    PRESENT = "present"
    ABSENT = "absent"


class Departure(StrEnum):
    """How a device left. Somebody who removes it means it; the others may be a blink."""

    REMOVED = "removed"
    DISCONNECTED = "disconnected"  # a gateway said so
    EXPIRED = "expired"  # no sign of life for its ttl; a heartbeat brings it back


@dataclass(frozen=True, slots=True)
class Device:
    """What somebody asks to have watched."""

    id: DeviceId
    agent_class: str
    address: str
    """Host name or IP address that probes go to; data, never part of a name or a command."""
    labels: Mapping[str, str] = field(default_factory=dict)
    ttl_s: float | None = None
    """Without a sign of life for so long it has left; 0 = never, None = as configured for its class."""


@dataclass(frozen=True, slots=True)
class DeviceRecord:
    """The durable record of a device. Written by compare-and-set only, and only when it changes."""

    slug: Slug
    device: Device
    presence: Presence
    generation: int
    """Goes up with each change of the wish (register, change, deregister)."""
    epoch: Epoch
    """Survives delete and re-add: an absent record is a tombstone that keeps it."""
    instance: str
    """The one instance accepted at this epoch; empty until its first report (S1)."""
    changed_at: WallTime
    """When the wish last changed."""
    index: int = 0
    """The store's compare-and-set token of this record; 0 = not stored yet."""
    event_at: int = 0
    """When the last signed event was signed, unix seconds of its sender's clock, whether it changed anything
    or not; 0 = the record was last changed in another way (`core.event_order`)."""
    event_marks: tuple[str, ...] = ()
    """Marks of the events that were signed at `event_at`."""
    source: str = ""
    """The static inventory that asks for it (`inventory:FILE`); "" = the API."""
    left: Departure = Departure.REMOVED
    """Of a tombstone: how the device left. Means nothing while it is present."""
    home: str = ""
    """The scheduler that the placement of this epoch is made on (`core.migration`); "" = the one of the time
    before the fleet was first moved."""
    condition: Condition | None = None
    """What is wrong with the device; None = nothing is known to be wrong (`core.device_condition`)."""


class PlacementState(StrEnum):
    """What a scheduler says about one run of an agent. Only DEAD means that no process can be left."""

    PENDING = "pending"  # wanted, not on any node yet
    STARTING = "starting"  # on a node, no process yet
    RUNNING = "running"
    RESTARTING = "restarting"  # the scheduler is handling a failure by itself
    STOPPING = "stopping"  # told to stop, a process may be left
    LOST = "lost"  # its node does not answer: a process may be left
    DEAD = "dead"  # every allocation is client-terminal; it will not come back


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
    """The scheduler's own handle (a job id, say); opaque outside the backend that made it."""
    instances: tuple[str, ...] = ()
    """Ids of the runs that may hold a process now (allocation ids, say)."""
    node: str = ""
    restarts: int = 0
    reason: str = ""
    """In words: why it is pending, restarting, lost or dead; of a running one, why it will not stay."""
    created_at: WallTime = WallTime(0.0)
    ready: bool | None = None
    """What the scheduler's own readiness probe says of the agent; None = it asks none."""
    backend: str = ""
    """The scheduler that has it; "" = the configured one."""
    waits_since: WallTime = WallTime(0.0)
    """When the scheduler last began anew with its start: the job was submitted, or its newest allocation or
    pod was made, whichever is later, by the scheduler's clock. 0 = it does not say."""
    queued: bool = False
    """No node has it: the scheduler says that none takes it now, or has not decided yet. The next epoch would
    wait in the same queue."""
    source: str = ""
    """URL below a replica's address that the agent is fetched from when it starts on a node; "" = it is not
    fetched from a replica, or that is not known."""
    api: tuple[str, ...] = ()
    """Addresses that it was started with to report to; () = not known."""


@dataclass(frozen=True, slots=True)
class Variant:
    """What a class is on one scheduler, in place of its own template and variables."""

    template: str = ""
    text: str = field(default="", repr=False)
    """As `AgentSpec.text`."""
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AgentSpec:
    """All that a scheduler needs to run the agent of one class. Equal hash = equal behaviour."""

    agent_class: str
    version: str
    spec_hash: str
    """Over the template, version, resources, probes and repairs of the class."""
    template: str = ""
    """Backend template: a built-in name or a path; empty = the backend's default."""
    text: str = field(default="", repr=False)
    """The template's text where it is a file, so that a replica without the file can use it; "" = the
    template is built in, or its file is read when it is used."""
    cpu_mhz: int = 50
    memory_bytes: int = 64 * 1024 * 1024
    kill_timeout_s: float = 10.0
    variables: Mapping[str, str] = field(default_factory=dict)
    """Operator's variables for the template (from config, never from a device)."""
    on: Mapping[str, Variant] = field(default_factory=dict)
    """By scheduler, what the class is there."""
    settings: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    """What the hash is made of, as text by dotted name (`config.settings_text`), for people; "#..." stands for a
    value that is not shown."""
    agent_config: Mapping[str, object] = field(default_factory=dict, repr=False)
    """The class's part of the agent's document (probes, repairs, intervals, API and Consul addresses), as values of
    JSON; `schedulers.agent_document` adds the device's part. It contains no secret as configured; `credentialed` adds
    the credential of a single agent for its start."""


@dataclass(frozen=True, slots=True)
class Health:
    """What Consul says about the accepted agent of a device: evidence, never existence."""

    status: str  # passing | warning | critical
    epoch: Epoch = NEVER
    node: str = ""
    address: str = ""
    output: str = ""


class AgentState(StrEnum):
    """What an agent says about its device."""

    OK = "ok"
    SUSPECT = "suspect"
    DEGRADED = "degraded"
    REPAIRING = "repairing"
    OFFLINE = "offline"
    UNABLE = "unable"
    """The agent can't ask: its resolver, its routes, its permissions or its file descriptors."""


@dataclass(frozen=True, slots=True)
class RepairAttempt:
    """One step of a repair ladder, as its agent tells it (watchdog_agent.wire)."""

    number: int
    """Goes up by one for each attempt of a device's ladder; 0 = not told."""
    step: str
    outcome: str
    reason: str
    age_s: float


@dataclass(frozen=True, slots=True)
class Repairs:
    """What an agent with a ladder says of it."""

    active: str = ""
    """What is being done, in words."""
    exhausted: bool = False
    """Nothing is left to try, and that was escalated."""
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
    """The device had answered this agent, or an earlier one of it, at least once (S6)."""
    misses: int
    confirmed: bool
    """A second, independent kind of probe failed too (S6)."""
    reason: str
    listen: str
    """Host and port where the agent listens."""
    version: str
    dropped: int = 0
    """Reports that the agent has discarded since its start."""
    stopping: bool = False
    repairs: Repairs | None = None
    """None: its class has none, or the agent is older than repairs."""
    gateway: str = ""
    """Address of the device's gateway; empty when the agent knows of none."""
    gateway_dead: bool = False
    state_age_s: float = 0.0
    """How long the state had lasted when it was reported, seconds, by the agent's clock; 0 = it has just
    begun, or an older agent that does not report it."""
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
    """Why no report of a running agent counts."""

    REFUSED = "refused"
    """The API refuses its reports."""
    SILENT = "silent"
    """No report comes."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The state of a device as a person should read it."""

    state: VerdictState
    reason: str
    ready: bool = False
    """The accepted agent is ready, whatever it reports about the device."""
    decides: bool = False
    """It rests on a fresh report of the accepted agent that says whether something is wrong with the
    device. Anything else leaves the condition of the device as it is."""
    suspected: bool = False
    """The report is a suspicion, whatever became of it with time."""
    unheard: Unheard | None = None
    """Why nothing is heard of an agent that runs; None = it is heard, or is not expected to be yet."""
    unlisted: bool = False
    """It rests on an agent that its scheduler does not list: an old process that nobody would stop."""
    agent: VerdictState | None = None
    """Where `state` is the kept condition of the device: the verdict without it."""


@dataclass(frozen=True, slots=True)
class PresenceRules:
    """When a device has left, and how long its agent waits for it to come back. Seconds are float."""

    ttl_s: float = 0.0
    """Of a device whose wish and class name none; 0 = it stays until it is deregistered."""
    class_ttl_s: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Agent class → its own default, over `ttl_s`."""
    grace_s: float = 0.0
    """The agent of a device that expired or was disconnected is kept for so long."""
    flap_changes: int = 6
    """So many changes of presence close together are flapping; 0 = nothing is ever said to flap."""
    flap_half_life_s: float = 300.0
    """After so long a change counts half."""

    def ttl_of(self, device: Device) -> float:
        """Seconds; 0 = for ever."""
        if device.ttl_s is not None:
            return device.ttl_s
        return self.class_ttl_s.get(device.agent_class, self.ttl_s)


@dataclass(frozen=True, slots=True)
class Limits:
    """How far and how fast the planner and the reconciler may go. Seconds are float."""

    breaker_min: int = 5
    """S7: a pass may always stop this many agents …"""
    breaker_fraction: float = 0.10
    """… or this share of the running ones, whichever is more."""
    replace_at_once: int = 5
    """Roll-out: at most this many devices may be between two versions at a time …"""
    replace_fraction: float = 0.10
    """… or this share of the fleet, whichever is more."""
    soak_s: float = 0.0
    """An agent of a new version that was ready for so long has proved it; 0 = none has to."""
    soak_deaths: int = 3
    """So many devices whose agent ended before that make a version bad."""
    kill_grace_s: float = 10.0
    startup_grace_s: float = 60.0
    """An agent younger than this that is not ready is starting, not unwatched; until enough starts
    have been measured (core/grace.py)."""
    startup_grace_min_s: float = 15.0
    startup_grace_max_s: float = 900.0
    """What is measured is held within these."""
    heartbeat_fresh_s: float = 15.0
    """A device whose own sign of life is younger is not offline, whatever its agent says."""
    report_stale_s: float = 45.0
    """No report for so long: the last one is no evidence any more (3 beats of 15 s)."""
    suspect_max_s: float = 120.0
    """Maximum duration of a suspicion that its agent neither confirms nor refutes."""
    repairing_max_s: float = 900.0
    """Maximum time that one repair may hide the state of a device."""
    start_max_s: float = 180.0
    """Maximum time that a placement may make no progress towards a running agent (`core.stuck_placements`); 0 = it is
    left to the scheduler."""
    incident_min: int = 3
    """So many devices of a gateway, host, site or class that turn bad within the window are one incident …"""
    incident_fraction: float = 0.20
    """… or this share of them, whichever is more."""
    incident_window_s: float = 60.0
    crash_loop_restarts: int = 5
    backoff_initial_s: float = 1.0
    backoff_max_s: float = 300.0
    starts_per_hour: int = 20
    """Budget of one device (S9)."""
    concurrency: int = 16
    """Calls to the scheduler under way at once (Nomad allows 100 connections a client)."""
    resync_s: float = 30.0
    """Full snapshot at least so often; hints only shorten the wait."""
    tombstone_ttl_s: float = 604_800.0
    """How long the record of a device that has left is kept (`core.tombstones`)."""
    presence: PresenceRules = PresenceRules()

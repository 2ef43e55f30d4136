"""What Nomad's HTTP API returns, as far as this project reads it (https://developer.hashicorp.com/nomad/api-docs).

A key may be missing, and Nomad writes null for an empty list or object, so readers use ``get(...) or ...``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Required, TypedDict


class TaskEvent(TypedDict, total=False):
    Type: str
    Time: int
    DisplayMessage: str


class TaskState(TypedDict, total=False):
    Restarts: int
    Events: list[TaskEvent] | None


class DesiredTransition(TypedDict, total=False):
    Migrate: bool | None


class Allocation(TypedDict, total=False):
    """A row of ``/v1/allocations``."""

    ID: Required[str]
    JobID: Required[str]
    ClientStatus: Required[str]
    ClientDescription: str
    DesiredStatus: str
    DesiredDescription: str
    DesiredTransition: DesiredTransition | None
    CreateIndex: int
    ModifyIndex: int
    CreateTime: int
    NodeID: str
    NodeName: str
    TaskStates: dict[str, TaskState] | None


class PlacementFailure(TypedDict, total=False):
    """Why a group of tasks was not placed (``AllocMetric``)."""

    ConstraintFiltered: dict[str, int] | None
    DimensionExhausted: dict[str, int] | None


class Evaluation(TypedDict, total=False):
    """A row of ``/v1/evaluations``."""

    JobID: Required[str]
    Status: str
    TriggeredBy: str
    FailedTGAllocs: dict[str, PlacementFailure] | None


class GetterOptions(TypedDict, total=False):
    checksum: str


class Artifact(TypedDict, total=False):
    GetterOptions: GetterOptions | None


class LogConfig(TypedDict, total=False):
    Disabled: bool | None
    Enabled: bool | None


class Task(TypedDict, total=False):
    Name: str
    Artifacts: list[Artifact] | None
    DispatchPayload: dict[str, str] | None
    Driver: str
    Env: dict[str, str] | None
    KillTimeout: int | None
    LogConfig: LogConfig | None
    Secrets: object


class Disconnect(TypedDict, total=False):
    """Block `disconnect`. Durations are in nanoseconds."""

    LostAfter: int | None
    Reconcile: str
    Replace: bool
    StopOnClientAfter: int | None


class EphemeralDisk(TypedDict, total=False):
    Sticky: bool | None
    Migrate: bool
    SizeMB: int | None


class ReschedulePolicy(TypedDict, total=False):
    Attempts: int
    Unlimited: bool


class RestartPolicy(TypedDict, total=False):
    Attempts: int | None
    Mode: str


class UpdateStrategy(TypedDict, total=False):
    MaxParallel: int


class JobAffinity(TypedDict, total=False):
    LTarget: str
    RTarget: str
    Operand: str
    Weight: int


class MigrateStrategy(TypedDict, total=False):
    MaxParallel: int


class TaskGroup(TypedDict, total=False):
    Name: str
    Count: int | None
    Disconnect: Disconnect | None
    EphemeralDisk: EphemeralDisk | None
    MaxClientDisconnect: int | None
    Migrate: MigrateStrategy
    Meta: dict[str, str] | None
    ReschedulePolicy: ReschedulePolicy | None
    RestartPolicy: RestartPolicy | None
    Scaling: Mapping[str, object]
    StopAfterClientDisconnect: int | None
    Tasks: list[Task] | None
    Update: UpdateStrategy


class ParameterizedJob(TypedDict, total=False):
    MetaOptional: list[str] | None
    MetaRequired: list[str] | None
    Payload: str


class Job(TypedDict, total=False):
    """A job as stored or parsed, or a row of ``/v1/jobs`` with its meta. A parsed job may lack even its ID."""

    ID: Required[str]
    Affinities: list[JobAffinity] | None
    Datacenters: list[str] | None
    JobModifyIndex: int
    Meta: dict[str, str] | None
    Name: str
    NodePool: str
    ParameterizedJob: ParameterizedJob | None
    ParentID: str
    Periodic: object
    Status: str
    Stop: bool
    SubmitTime: int
    TaskGroups: list[TaskGroup] | None
    Type: str | None
    Update: UpdateStrategy


class GroupScale(TypedDict, total=False):
    Desired: int


class JobScale(TypedDict, total=False):
    """Answer of ``/v1/job/ID/scale``."""

    TaskGroups: dict[str, GroupScale] | None


class CpuStats(TypedDict, total=False):
    Measured: list[str] | None
    TotalTicks: float


class MemoryStats(TypedDict, total=False):
    RSS: int
    Usage: int


class ResourceUsage(TypedDict, total=False):
    CpuStats: CpuStats
    MemoryStats: MemoryStats


class AllocationStats(TypedDict, total=False):
    """Answer of ``/v1/client/allocation/ID/stats``."""

    ResourceUsage: ResourceUsage


class Dispatched(TypedDict, total=False):
    """Answer to a dispatch."""

    DispatchedJobID: str
    EvalID: str


class DriverState(TypedDict, total=False):
    Healthy: bool


class NodeRow(TypedDict, total=False):
    """A row of ``/v1/nodes``, or the node of ``/v1/node/ID`` or of an event."""

    ID: str
    Name: str
    Status: str
    Drain: bool
    DrainStrategy: object
    SchedulingEligibility: str
    Datacenter: str
    Drivers: dict[str, DriverState] | None
    NodePool: str


class EventPayload(TypedDict, total=False):
    Allocation: Allocation
    Evaluation: Evaluation
    Node: NodeRow


class StreamEvent(TypedDict, total=False):
    Topic: str
    Type: str
    Payload: EventPayload | None


class Frame(TypedDict, total=False):
    """One line of the event stream; empty for a heartbeat."""

    Index: int
    Events: list[StreamEvent] | None


class HostCpuStats(TypedDict, total=False):
    Idle: float
    """Percent."""


class HostMemoryStats(TypedDict, total=False):
    Total: int
    Available: int


class ClientStats(TypedDict, total=False):
    """Of ``/v1/client/stats``."""

    CPU: list[HostCpuStats] | None
    Memory: HostMemoryStats | None

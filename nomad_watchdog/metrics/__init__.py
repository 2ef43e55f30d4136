"""Every metric, declared once. Label values come from fixed sets, so the number of series is bounded."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from nomad_watchdog import __version__
from nomad_watchdog.core.actions import ActionKind
from nomad_watchdog.core.incidents import GroupKind
from nomad_watchdog.metrics.hosts import HostMetrics
from nomad_watchdog.metrics.labels import (
    ACTIONS,
    OTHER,
    REPORTS,
    STATUS_CLASSES,
    Closing,
    CommitOutcome,
    PassOutcome,
    RefusalReason,
    ResyncReason,
    SchedulerErrorKind,
    known,
)
from nomad_watchdog.metrics.leases import LeaseMetrics
from nomad_watchdog.metrics.rollouts import RolloutMetrics
from nomad_watchdog.model import PlacementState, Unheard, VerdictState

_FAST: Final = (0.0005, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SLOW: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """The metrics of one control plane, in a registry of its own; every series is 0 at start."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._make_agents()
        self._make_reconciler()
        self._make_registry()
        self._make_inputs()
        self._make_pools()
        self._make_api()
        self.hosts = HostMetrics(self.registry)
        self.leases = LeaseMetrics(self._gauge)
        self._info = self._gauge("build_info", "Always 1; see the labels.", "version", "python")
        self._info.labels(__version__, platform.python_version()).set(1)
        self._routes: frozenset[str] = frozenset()
        self._answered: dict[tuple[str, int], Counter] = {}
        self._acted: dict[tuple[str, str], Counter] = {}
        self._dropped_before = self._left_out_before = 0
        self._start_at_zero()

    def _make_agents(self) -> None:
        self._devices = self._gauge("devices", "Devices by verdict.", "verdict")
        self._placements = self._gauge("placements", "Placements by state.", "state")
        self._reports = self._counter("reports", "Reports of agents, by decision.", "outcome")
        self._unheard = self._gauge(
            "unheard_agents", "Running agents whose reports do not arrive or are refused.", "reason"
        )
        self._unlisted = self._gauge(
            "unlisted_agents", "Agents that report but that their scheduler does not list."
        )
        self._stalled = self._gauge(
            "stalled_placements", "Placements without progress for longer than agents.start_max."
        )
        self._incidents = self._gauge("incidents_open", "Open incidents by group.", "group")
        self.rollouts = RolloutMetrics(self._gauge)
        self._moving = {
            what: self._gauge(f"{what}_devices", f"Devices of the {what} in progress.", "state")
            for what in ("migration", "rebalance")
        }

    def _make_reconciler(self) -> None:
        self._dispatches = self._counter(
            "dispatches", "Starts requested from the scheduler.", "outcome"
        )
        self._retires = self._counter("retires", "Stops requested from the scheduler.", "outcome")
        self._passes = self._counter("passes", "Passes of the reconciler.", "outcome")
        self._pass_seconds = self._histogram("pass_seconds", "Duration of a pass.", _FAST)
        self._event_to_dispatch = self._histogram(
            "event_to_dispatch_seconds",
            "Time from a change of the desired state to the accepted start.",
            _SLOW,
        )
        self._queue_depth = self._gauge("queue_depth", "Actions waiting.")
        self._queue_oldest = self._gauge("queue_oldest_seconds", "Age of the oldest action.")
        self._errors = self._counter("scheduler_errors", "Failed scheduler calls.", "kind")
        self._resyncs = self._counter("resyncs", "Full reads of the scheduler.", "reason")
        self._snapshot_age = self._gauge("snapshot_age_seconds", "Age of the last full snapshot.")
        self._consul_age = self._gauge(
            "consul_view_age_seconds", "Age of the health data from Consul."
        )
        self._unsafe = self._counter(
            "unsafe_starts", "Starts that the planner's own check refused: a bug."
        )
        self._holds = self._counter(
            "breaker_holds", "Times that the mass-change breaker put stops on hold."
        )
        self._held = self._gauge("breaker_held", "1 while the breaker has stops on hold.")

    def _make_registry(self) -> None:
        self._commits = self._counter("registry_commits", "Records written.", "outcome")
        self._unreadable = self._gauge("registry_unreadable", "1: the registry can't be read.")
        self._unwritable = self._gauge("registry_unwritable", "1: the registry can't be written.")
        self._restores = self._counter(
            "registry_restores", "Times that the registry went back in time."
        )
        self._poisoned = self._gauge("poisoned_records", "Records that can't be decoded.")
        self._stored = self._gauge("events_stored", "1 while events are written to disk.")
        self._dropped = self._counter("events_dropped", "Events that were never written.")
        self._left_out = self._counter(
            "events_left_out", "Events beyond the rate of one sender (device or token).", "sender"
        )

    def _make_inputs(self) -> None:
        self._flapping = self._gauge(
            "flapping_devices", "Devices that connect and depart too often."
        )
        self._paused = self._gauge("paused_devices", "Devices whose actions are paused.")
        self._expired = self._counter(
            "expired_devices", "Devices that expired for lack of heartbeats."
        )
        self._departures_held = self._gauge("departures_held", "Departures on hold.")
        self._bad_inventories = self._gauge("inventory_problems", "Inventories that can't be used.")
        self._conflicts = self._gauge(
            "inventory_conflicts", "Devices of inventories that another source has registered."
        )
        self._config_problem = self._gauge("config_problem", "1: the last reload was rejected.")
        self._restart = self._gauge("config_needs_restart", "Settings that need a restart.")
        self._differs = self._gauge("config_differs", "1: other class specs are in force.")

    def _make_api(self) -> None:
        self._requests = self._counter("api_requests", "Responses of the API.", "route", "status")
        self._refusals = self._counter("api_refusals", "Refused requests.", "reason")
        self._malformed = self._counter("api_malformed", "Requests that are not valid HTTP.")
        self._closings = self._counter(
            "api_connections_closed", "Connections that the API closed.", "reason"
        )
        self._open = self._gauge("api_connections", "Open connections of the API.", "state")

    def _start_at_zero(self) -> None:
        for what in self._moving:
            self.moving(what, 0, 0, 0)
        self.routes(())
        for metric, values in (
            (self._devices, VerdictState),
            (self._placements, PlacementState),
            (self._dispatches, ACTIONS),
            (self._retires, ACTIONS),
            (self._passes, PassOutcome),
            (self._commits, CommitOutcome),
            (self._reports, REPORTS),
            (self._errors, SchedulerErrorKind),
            (self._resyncs, ResyncReason),
            (self._incidents, GroupKind),
            (self._refusals, RefusalReason),
            (self._closings, Closing),
            (self._unheard, Unheard),
        ):
            for value in values:
                metric.labels(str(value))

    def _make_pools(self) -> None:
        self._pool_wanted = self._gauge("pool_workers_wanted", "Workers requested.", "pool")
        self._pool_running = self._gauge("pool_workers_running", "Workers running.", "pool")
        self._pool_advised = self._gauge(
            "pool_workers_advised", "Workers that the metric calls for.", "pool"
        )
        self._pool_value = self._gauge("pool_metric", "Last value of the metric.", "pool")
        self._pool_problem = self._gauge(
            "pool_problem", "1: the pool can't be scaled or read.", "pool"
        )
        self._pool_scalings = self._counter(
            "pool_scalings", "Changes of the number of workers.", "pool", "direction"
        )

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"nomad_watchdog_{name}", text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"nomad_watchdog_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"nomad_watchdog_{name}", text, buckets=buckets, registry=self.registry)

    def routes(self, names: Iterable[str]) -> None:
        """Declare the routes of the API, so that their series start at 0."""
        self._routes |= {*names, OTHER}
        for name in self._routes:
            for status in STATUS_CLASSES:
                self._requests.labels(name, status)

    def names(self) -> frozenset[str]:
        """The metric names as they are exposed (counters with `_total`)."""
        return frozenset(
            f"{family.name}_total" if family.type == "counter" else family.name
            for family in self.registry.collect()
        )

    def render(self) -> bytes:
        """All metrics in the Prometheus text format."""
        return generate_latest(self.registry)

    def devices(self, counts: Mapping[str, int]) -> None:
        """Devices by verdict; a verdict that is missing counts 0."""
        for state in VerdictState:
            self._devices.labels(state.value).set(counts.get(state, 0))

    def placements(self, counts: Mapping[str, int]) -> None:
        """Placements by state; a state that is missing counts 0."""
        for state in PlacementState:
            self._placements.labels(state.value).set(counts.get(state, 0))

    def action(self, kind: str, outcome: str) -> None:
        """Count a start, retire or replace. A replace counts as the retire that it begins with."""
        series = self._acted.get((kind, outcome))
        if series is None:
            metric = self._dispatches if kind == ActionKind.START else self._retires
            series = self._acted[kind, outcome] = metric.labels(known(outcome, ACTIONS))
        series.inc()

    def passed(self, outcome: str, took_s: float) -> None:
        """A pass ended."""
        self._passes.labels(known(outcome, PassOutcome)).inc()
        self._pass_seconds.observe(took_s)

    def event_to_dispatch(self, took_s: float) -> None:
        """A start was accepted this long after the desired state changed."""
        self._event_to_dispatch.observe(took_s)

    def queue(self, depth: int, oldest_s: float) -> None:
        """Length of the work queue and the age of its oldest action."""
        self._queue_depth.set(depth)
        self._queue_oldest.set(oldest_s)

    def committed(self, outcome: str, count: int = 1) -> None:
        """Count records of a commit by outcome."""
        self._commits.labels(known(outcome, CommitOutcome)).inc(count)

    def report(self, outcome: str) -> None:
        """Count a report by decision."""
        self._reports.labels(known(outcome, REPORTS)).inc()

    def scheduler_error(self, kind: str) -> None:
        """A call to the scheduler failed."""
        self._errors.labels(known(kind, SchedulerErrorKind)).inc()

    def resync(self, reason: str) -> None:
        """Everything is read again."""
        self._resyncs.labels(known(reason, ResyncReason)).inc()

    def unsafe_start(self) -> None:
        """The planner's own check has refused a start."""
        self._unsafe.inc()

    def breaker_held(self, *, held: bool) -> None:
        """The breaker put stops on hold (counted), or released them."""
        if held:
            self._holds.inc()
        self._held.set(held)

    def consul_view_age(self, age_s: float) -> None:
        self._consul_age.set(age_s)

    def snapshot_age(self, age_s: float) -> None:
        self._snapshot_age.set(age_s)

    def unheard(self, counts: Mapping[Unheard, int]) -> None:
        """Running agents whose reports do not arrive, by reason."""
        for why in Unheard:
            self._unheard.labels(why.value).set(counts.get(why, 0))

    def unlisted(self, count: int) -> None:
        """Agents that report but that their scheduler does not list."""
        self._unlisted.set(count)

    def stalled(self, count: int) -> None:
        """Placements without progress for longer than the limit."""
        self._stalled.set(count)

    def incidents(self, opened: Mapping[str, int]) -> None:
        """Open incidents by kind of group."""
        for kind in GroupKind:
            self._incidents.labels(kind.value).set(opened.get(kind, 0))

    def events(self, store: Mapping[str, object]) -> None:
        """The state of the event store (`EventStore.status`)."""
        self._stored.set(bool(store.get("stored")))
        dropped = store.get("dropped")
        if isinstance(dropped, int) and dropped > self._dropped_before:
            self._dropped.inc(dropped - self._dropped_before)
            self._dropped_before = dropped

    def events_left_out(self, total: int) -> None:
        """Events that were left out since the start (`DeviceLimits.total`)."""
        self._left_out.labels("token")
        self._left_out.labels("device").inc(max(0, total - self._left_out_before))
        self._left_out_before = total

    def audit_left_out(self) -> None:
        """Count a change without an audit event."""
        self._left_out.labels("token").inc()

    def registry_unreadable(self, unreadable: bool) -> None:
        self._unreadable.set(unreadable)

    def registry_unwritable(self, unwritable: bool) -> None:
        self._unwritable.set(unwritable)

    def registry_restored(self) -> None:
        """The registry went back in time."""
        self._restores.inc()

    def poisoned(self, count: int) -> None:
        self._poisoned.set(count)

    def attendance(self, *, flapping: int, paused: int) -> None:
        """Numbers of flapping and of paused devices."""
        self._flapping.set(flapping)
        self._paused.set(paused)

    def expired(self, count: int) -> None:
        """Count devices that expired for lack of heartbeats."""
        self._expired.inc(count)

    def moving(self, what: str, moved: int, on_way: int, waiting: int) -> None:
        """`migration` or `rebalance`: devices that have moved and are healthy, that are being moved, and that wait."""
        for state, count in (("moved", moved), ("on_way", on_way), ("waiting", waiting)):
            self._moving[what].labels(state).set(count)

    def departures_held(self, count: int) -> None:
        self._departures_held.set(count)

    def config(self, *, problem: bool, restart: int) -> None:
        """Whether the last reload was rejected, and the number of settings that need a restart."""
        self._config_problem.set(problem)
        self._restart.set(restart)

    def config_differs(self, *, differs: bool) -> None:
        """Whether the class specs of this replica's configuration are not those that are in force."""
        self._differs.set(differs)

    def inventories(self, *, problems: int, conflicts: int) -> None:
        """Numbers of inventories that can't be used, and of their devices that another source has registered."""
        self._bad_inventories.set(problems)
        self._conflicts.set(conflicts)

    def pools(self, names: Iterable[str]) -> None:
        """Declare the configured pools, so that their series start at 0."""
        for name in names:
            for metric in (self._pool_wanted, self._pool_running, self._pool_advised):
                metric.labels(name)
            self._pool_problem.labels(name)
            for direction in ("up", "down"):
                self._pool_scalings.labels(name, direction)

    def pool(self, name: str, *, wanted: int, running: int, advised: int, problem: bool) -> None:
        """The state of a pool; 0 on a replica that does not control it, so that a sum over replicas is correct."""
        self._pool_wanted.labels(name).set(wanted)
        self._pool_running.labels(name).set(running)
        self._pool_advised.labels(name).set(advised)
        self._pool_problem.labels(name).set(problem)

    def pool_value(self, name: str, value: float) -> None:
        """The value of a pool's metric. There is no series before the first reading, because 0 would be wrong."""
        self._pool_value.labels(name).set(value)

    def pool_scaled(self, name: str, direction: str) -> None:
        """The built-in scaler changed a pool."""
        self._pool_scalings.labels(name, direction).inc()

    def request(self, route: str, status: int) -> None:
        """Count a response. `route` is the template of a route, never the path of a request."""
        key = (route if route in self._routes else OTHER, status // 100)
        if key not in self._answered:
            self._answered[key] = self._requests.labels(key[0], f"{key[1]}xx")
        self._answered[key].inc()

    def refused(self, reason: str) -> None:
        """Count a refused request."""
        self._refusals.labels(known(reason, RefusalReason)).inc()

    def malformed(self) -> None:
        """Count a request that is not valid HTTP."""
        self._malformed.inc()

    def connection_closed(self, reason: str) -> None:
        """Count a connection that the API closed."""
        self._closings.labels(known(reason, Closing)).inc()

    def connections(self, count: Callable[[], tuple[int, int]]) -> None:
        """`count`: called at each scrape; returns the unauthenticated and the authenticated connections."""
        self._open.labels("unauthenticated").set_function(lambda: count()[0])
        self._open.labels("authenticated").set_function(lambda: count()[1])

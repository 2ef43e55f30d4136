"""DOING: carries out actions, one device at a time, each start after its compare-and-set (S2).

An action is worth nothing once the record has moved on: it is dropped, and the next pass decides
again. A failure costs the device its own back-off and nobody else anything (S9).
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, TypeVar

from nomad_watchdog import failpoints
from nomad_watchdog.controllers.agents.fence import Fence, Fenced
from nomad_watchdog.controllers.agents.retry_budget import RetryBudget
from nomad_watchdog.controllers.agents.workqueue import WorkQueue
from nomad_watchdog.core.actions import Action, ActionKind, ActionOutcome, Move
from nomad_watchdog.core.circuit_breaker import CircuitBreaker
from nomad_watchdog.errors import (
    FencedError,
    TerminalError,
    TransientError,
    UnpreparedError,
    WatchdogError,
)
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import AgentSpec, DeviceRecord, Epoch, Monotonic, PlacementState
from nomad_watchdog.replicas.leases import Leases, SoleOwner, check
from nomad_watchdog.schedulers import Scheduler
from nomad_watchdog.signals import Signal

log = logging.getLogger(__name__)

_T = TypeVar("_T")
BATCH: Final = 32
"""Actions taken at once, so that their epochs go up in one transaction of the registry."""
WORKERS: Final = 2
"""Who fence what is next; one more does nothing but urgent events, so that none waits for a storm (L4)."""
HEAD_START: Final = 8 * BATCH
"""An urgent action is done before so many that were fenced earlier, and no later one is passed for ever."""
FENCE_S: Final = 30.0
"""An action acts on what its fence found at most so much later. A longer wait for a free slot, or a
frozen process, is a new decision; `graveyard.REST_S` counts on it (S2)."""
AHEAD: Final = 2
"""So many times `concurrency` actions are fenced and in hand, at most a batch a worker more: no slot
stands empty while a batch is being fenced."""


@dataclass(frozen=True, slots=True)
class Expectation:
    """A start that no snapshot has shown yet. Nothing is decided for the device until one with at
    least this index has been taken (S8)."""

    epoch: Epoch
    index: int
    since: Monotonic


@dataclass(order=True, frozen=True, slots=True)
class _Ready:
    """A fenced action that waits for its turn, and what it was fenced with."""

    place: int
    number: int
    action: Action = field(compare=False)
    record: Fenced = field(compare=False)
    fenced_at: Monotonic = field(compare=False)


@dataclass(slots=True)
class ActionExecutor:
    """Takes actions from the queue and does them. `done` is called after each, with its outcome."""

    fleet: Fleet
    scheduler: Scheduler
    specs: Mapping[str, AgentSpec]
    queue: WorkQueue[Slug, Action]
    done: Callable[[Action, ActionOutcome, float], None]
    leases: Leases = field(default_factory=SoleOwner)
    adapt: Callable[[AgentSpec], AgentSpec] = lambda spec: spec
    """Called at each start; returns the spec with what holds only at that moment, such as the replicas' addresses."""
    avoids: list[Callable[[DeviceRecord], Collection[str]]] = field(default_factory=list)
    """Called at each start: the hosts that controllers ask its scheduler to avoid (`AgentSpec.avoid`)."""
    ended: Signal[[Action, ActionOutcome, float]] = field(default_factory=Signal)
    """An action has ended: how, and how long it took, seconds."""
    spec_for: Callable[[DeviceRecord, Move | None], AgentSpec | None] | None = None
    """The spec with which an agent of a device is started now, or replaced in place for this reason; None = its class
    is not configured. Without it, that of its class."""
    expectations: dict[Slug, Expectation] = field(default_factory=dict)
    stops: dict[str, tuple[Action, Monotonic]] = field(default_factory=dict)
    """By the ref of the placement: stops that were answered, and when."""
    obstacles: dict[Slug, str] = field(default_factory=dict)
    budgets: dict[Slug, RetryBudget] = field(default_factory=dict)
    unprepared: set[Slug] = field(default_factory=set)
    """Devices whose last start failed for want of what `Scheduler.prepare` makes."""
    needs_preparation: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a start failed for that reason."""
    circuit: CircuitBreaker = field(default_factory=CircuitBreaker)
    """Of the scheduler."""
    registry_circuit: CircuitBreaker = field(default_factory=CircuitBreaker)
    _ready: asyncio.PriorityQueue[_Ready] = field(default_factory=asyncio.PriorityQueue)
    _number: int = 0
    _in_hand: int = 0
    _spare: asyncio.Event = field(default_factory=asyncio.Event)
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._spare.set()
        self._idle.set()
        self.ended.connect(self.done)

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(WORKERS):
                group.create_task(self._fence_for_ever(urgent_only=False))
            group.create_task(self._fence_for_ever(urgent_only=True))
            for _ in range(self.fleet.limits.concurrency):
                group.create_task(self._act_for_ever())

    async def perform(self, batch: Sequence[Action]) -> None:
        """Do a batch to its end, with no `run` beside it."""
        await self._begin(batch)
        async with asyncio.TaskGroup() as group:
            for _ in range(min(len(batch), self.fleet.limits.concurrency)):
                group.create_task(self._act_on_rest())

    async def _fence_for_ever(self, *, urgent_only: bool) -> None:
        while True:
            most = await self._turn(urgent_only=urgent_only)
            taken = await self.queue.take(most, urgent_only=urgent_only)
            await self._begin([action for _, action in taken])

    async def _act_for_ever(self) -> None:
        while True:
            ready = await self._ready.get()
            await self._act(ready)

    async def _act_on_rest(self) -> None:
        while not self._ready.empty():
            await self._act(self._ready.get_nowait())

    async def _turn(self, *, urgent_only: bool) -> int:
        """Wait until something may be begun; how many actions at once."""
        while True:
            if not urgent_only:
                await self._spare.wait()
            now = self.fleet.clock.monotonic()
            circuits = (self.circuit, self.registry_circuit)
            most = min(one.allowance(BATCH, now) for one in circuits)
            if most == 0:
                await asyncio.sleep(max(one.wait_s(now) for one in circuits))
            elif most < BATCH and self._in_hand:
                # one try at a time: what it brings says whether there is another
                await self._idle.wait()
            else:
                return most

    async def _begin(self, batch: Sequence[Action]) -> None:
        """Fence all of a batch in one commit; who acts takes it from there."""
        self._hand(len(batch))
        failpoints.reached("K4")
        try:
            fenced = await Fence(self.fleet, self.leases).pass_all(batch)
        except FencedError as error:
            fenced = [error] * len(batch)
        except WatchdogError as error:
            for action in batch:
                if isinstance(error, TransientError):
                    self._refused(self.registry_circuit, "registry", action.slug, error)
                self._failed(action, error)
                self.queue.done(action.slug)
            self._hand(-len(batch))
            return
        self.registry_circuit.answered()
        now = self.fleet.clock.monotonic()
        for action, record in zip(batch, fenced, strict=True):
            self._number += 1
            place = self._number - HEAD_START * self.queue.is_urgent(action.slug)
            self._ready.put_nowait(_Ready(place, self._number, action, record, now))

    def _hand(self, more: int) -> None:
        self._in_hand += more
        if self._in_hand:
            self._idle.clear()
        else:
            self._idle.set()
        if self._in_hand < AHEAD * self.fleet.limits.concurrency:
            self._spare.set()
        else:
            self._spare.clear()

    async def _act(self, ready: _Ready) -> None:
        action = ready.action
        try:
            await self._apply(action, self._checked(ready))
        except FencedError as error:
            self._dropped(action, error)
        except WatchdogError as error:
            self._failed(action, error)
        except Exception as error:  # the worker's boundary: a bug costs one device, not the loop
            log.exception("action crashed", extra={"slug": action.slug})
            self._failed(action, TerminalError(f"internal error: {type(error).__name__}"))
        else:
            self.obstacles.pop(action.slug, None)
            self.unprepared.discard(action.slug)
            took_s = self.fleet.clock.monotonic() - ready.fenced_at
            epoch = action.epoch
            if action.kind is not ActionKind.RETIRE and isinstance(ready.record, DeviceRecord):
                epoch = ready.record.epoch  # a first one is above the floor
            self.fleet.events.note(
                action.slug, f"plan.{action.kind.value}", action.reason, epoch=int(epoch)
            )
            self.ended.emit(action, ActionOutcome.OK, took_s)
        finally:
            self.queue.done(action.slug)
            self._hand(-1)

    def _checked(self, ready: _Ready) -> DeviceRecord | None:
        """The record to act on. It may have waited long for its turn: a holder that slept finds its actions
        dead."""
        if isinstance(ready.record, WatchdogError):
            raise ready.record
        check(self.leases, ready.action.slug)
        if self.fleet.clock.monotonic() - ready.fenced_at > FENCE_S:
            raise FencedError(f"it waited for more than {FENCE_S:.0f} s for its turn")
        return ready.record

    def _dropped(self, action: Action, error: FencedError) -> None:
        log.info("action dropped", extra={"slug": action.slug, "reason": str(error)})
        self.ended.emit(action, ActionOutcome.FENCED, 0.0)

    async def _apply(self, action: Action, record: DeviceRecord | None) -> None:
        spec = self.specs.get(action.placement.agent_class) if action.placement else None
        grace_s = spec.kill_timeout_s if spec is not None else self.fleet.limits.kill_grace_s
        if action.kind is ActionKind.START and record is not None:
            await self._start(record)
        elif (
            action.kind is ActionKind.REPLACE
            and not action.home
            and self.scheduler.capabilities.replaces_in_place
        ):
            assert record is not None
            await self._start(record, action.move)
        elif action.placement is not None:
            await self._ask(action.slug, self.scheduler.retire(action.placement, grace_s))
            failpoints.reached("K10")
            self.stops[action.placement.ref] = (action, self.fleet.clock.monotonic())
            self._mark_stopping(action)

    async def _start(self, record: DeviceRecord, move: Move | None = None) -> None:
        """`move`: why the agent is replaced in place; None = it is started."""
        now = self.fleet.clock.monotonic()
        spec = (
            self.specs.get(record.device.agent_class)
            if self.spec_for is None
            else self.spec_for(record, move)
        )
        if spec is None:
            raise TerminalError(f"agent class {record.device.agent_class!r} is not configured")
        budget = self.budgets.setdefault(record.slug, RetryBudget())
        allowed = budget.may_start(self.fleet.limits, now)
        if allowed > now:
            self.queue.delay(record.slug, allowed)
            raise TransientError(
                f"started {len(budget.starts)} times within an hour; "
                f"next try in {allowed - now:.0f} s",
                retry_after_s=allowed - now,
            )
        self.fleet.recorder.dispatched(record.slug, record.epoch)
        failpoints.reached("K6")
        adapted = self.adapt(spec)
        if avoid := {host for hosts in self.avoids for host in hosts(record)}:
            adapted = replace(adapted, avoid=tuple(sorted(avoid)))
        index = await self._ask(record.slug, self.scheduler.ensure(record, record.epoch, adapted))
        failpoints.reached("K7")
        self.queue.delay(record.slug, budget.started(self.fleet.limits, now))
        self.expectations[record.slug] = Expectation(
            record.epoch, index, self.fleet.clock.monotonic()
        )
        failpoints.reached("K8")

    async def _ask(self, slug: Slug, call: Awaitable[_T]) -> _T:
        """The scheduler's answer; whoever gets none is counted against the server, not the device only."""
        try:
            answer = await call
        except TransientError as error:
            self._refused(self.circuit, "scheduler", slug, error)
            raise
        except WatchdogError:
            self.circuit.answered()
            raise
        self.circuit.answered()
        return answer

    def _refused(
        self, circuit: CircuitBreaker, who: str, slug: Slug, error: TransientError
    ) -> None:
        now = self.fleet.clock.monotonic()
        jitter = random.random()  # noqa: S311  # jitter
        if circuit.failed(slug, now, error.retry_after_s or 0.0, jitter):
            wait_s = round(circuit.wait_s(now), 3)
            facts = {"server": who, "reason": str(error), "retry_in_s": wait_s}
            log.warning("server refuses", extra=facts)

    def end_backoff(self) -> None:
        """The scheduler has been prepared anew: what failed for want of it is tried again now."""
        now = self.fleet.clock.monotonic()
        for slug in self.unprepared:
            self.queue.delay(slug, now)
        self.unprepared.clear()

    def remember_stops(self, began: Monotonic) -> None:
        """After each snapshot: one that began before a stop was answered may show the agent as it was, and
        the next pass would stop it again (S5). Those begun later show the stop."""
        for ref, (action, answered) in list(self.stops.items()):
            if answered < began:
                del self.stops[ref]
            else:
                self._mark_stopping(action)

    def _mark_stopping(self, action: Action) -> None:
        # Our own write, until a snapshot says it.
        gone = action.placement
        assert gone is not None
        self.fleet.placements[action.slug] = tuple(
            replace(p, state=PlacementState.STOPPING)
            if p.ref == gone.ref and p.state is not PlacementState.DEAD
            else p
            for p in self.fleet.placements.get(action.slug, ())
        )

    def _failed(self, action: Action, error: WatchdogError) -> None:
        now = self.fleet.clock.monotonic()
        budget = self.budgets.setdefault(action.slug, RetryBudget())
        again = budget.failed(self.fleet.limits, now)
        if isinstance(error, TransientError) and error.retry_after_s:
            again = Monotonic(max(again, now + error.retry_after_s))
        self.queue.delay(action.slug, again)
        if isinstance(error, UnpreparedError):
            self.unprepared.add(action.slug)
            self.needs_preparation.set()
        self.obstacles[action.slug] = f"{action.kind.value} failed: {error}"
        log.warning(
            "action failed",
            extra={
                "slug": action.slug,
                "action": action.kind.value,
                "epoch": int(action.epoch),
                "reason": str(error),
                "retry_in_s": round(again - now, 3),
            },
        )
        self.fleet.events.note(action.slug, "error", f"{action.kind.value}: {error}")
        self.ended.emit(action, ActionOutcome.FAILED, 0.0)

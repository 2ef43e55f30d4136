"""Reports about the registry: that it went back in time, that it can't be read, that it can be read
again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import pytest

from nomad_watchdog.controllers.agents.reconciler import Reconciler
from nomad_watchdog.core.pauses import Pause, Target
from nomad_watchdog.errors import DeniedError, TransientError, UserError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import DeviceId
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import Device, Limits
from nomad_watchdog.registry import RegistryDocument
from tests.simulation.fakes import Cluster, FakeRegistry, FakeScheduler, Line, Store
from tests.simulation.simulator import SPEC
from tests.simulation.virtual_time import VirtualClock, VirtualLoop

T = TypeVar("T")


class Denying(Line):
    """Calls whose name starts with `denied` raise `error`."""

    denied = "nothing"
    error: Exception = DeniedError("Consul: read of key nomad-watchdog/meta was denied")

    async def call(self, what: str, effect: Callable[[], T]) -> T:
        if what.startswith(self.denied):
            raise self.error
        return await super().call(what, effect)


class World:
    """A running control plane with three devices."""

    def __init__(self) -> None:
        self.store = Store()
        self.store.initialise("test")
        self.line = Denying()
        self.metrics = Metrics()
        clock = VirtualClock(asyncio.get_running_loop())
        self.fleet = Fleet(FakeRegistry(self.store, self.line), Limits(), clock)
        self.cluster = Cluster()

    def metric(self, name: str) -> float:
        found = self.metrics.registry.get_sample_value(f"nomad_watchdog_{name}")
        assert found is not None
        return found

    def events(self) -> list[str]:
        events, _ = self.fleet.events.own.after(0, 999)
        return [event.kind for event in events if event.kind.startswith("registry.")]

    async def register(self, *names: str) -> None:
        await self.fleet.records.register(
            [Device(DeviceId(n), SPEC.agent_class, "127.0.0.1") for n in names]
        )
        await asyncio.sleep(5.0)

    def backup(self) -> tuple[int, dict[Any, Any], dict[str, RegistryDocument]]:
        return self.store.index, dict(self.store.rows), dict(self.store.documents)

    def restore(self, backup: tuple[int, dict[Any, Any], dict[str, RegistryDocument]]) -> None:
        self.store.index, self.store.rows, self.store.documents = backup
        self.store.news.tell(frozenset())


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    made = World()
    specs = {SPEC.agent_class: SPEC}
    reconciler = Reconciler(made.fleet, FakeScheduler(made.cluster), specs, made.metrics)
    task = asyncio.ensure_future(reconciler.run())
    await asyncio.wait_for(made.fleet.readiness.event.wait(), 10.0)
    await made.register("cam 1", "cam 2", "cam 3")
    try:
        yield made
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def played(scenario: Callable[[World], Coroutine[Any, Any, None]]) -> None:
    async def all_of_it() -> None:
        async with world() as made:
            await scenario(made)

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(all_of_it())


def test_a_restored_backup_is_reported_once_with_what_it_took_back() -> None:
    """Older and lost records are named in one event, in the status and in a metric, within a
    second."""

    async def scenario(made: World) -> None:
        backup = made.backup()
        await made.fleet.records.deregister([DeviceId("cam 2")])
        await made.register("pump 1")
        assert made.fleet.views.status()["registry_restored"] == ""
        made.restore(backup)
        await asyncio.sleep(1.0)
        said = str(made.fleet.views.status()["registry_restored"])
        assert "1 device has an older record than before (cam 2)" in said
        assert "1 device has no record any more (pump 1)" in said
        await asyncio.sleep(60.0)
        assert made.events() == ["registry.restored"]
        assert made.metric("registry_restores_total") == 1
        assert made.fleet.readiness.ready

    played(scenario)


def test_deleted_records_are_reported_after_a_second_read() -> None:
    """Records that vanish while the index grows are reported once another read has confirmed it."""

    async def scenario(made: World) -> None:
        made.store.rows.popitem()
        made.store.index += 1
        made.store.news.tell(frozenset())
        await asyncio.sleep(0.5)
        assert made.events() == []
        await asyncio.sleep(10.0)
        assert made.events() == ["registry.restored"]
        assert "1 device has no record any more (cam 3)" in str(made.fleet.views.status())

    played(scenario)


def test_a_lost_pause_is_reported() -> None:
    """A backup that differs only in its pauses is detected too: those devices are no longer
    protected."""

    async def scenario(made: World) -> None:
        clock, pauses = made.fleet.clock, made.fleet.presence.pauses
        target = Target(devices=frozenset({"cam 1"}))
        backup = made.backup()
        await pauses.add(Pause("0" * 12, target, clock.wall(), None, "work", "me"))
        await asyncio.sleep(5.0)
        made.restore(backup)
        await asyncio.sleep(3.0)
        assert made.events() == ["registry.restored"]
        assert "the pauses are older than before" in str(made.fleet.views.status())
        assert pauses.in_force() == ()

    played(scenario)


@pytest.mark.parametrize("denied", ["registry", "registry.document"])
def test_an_unreadable_registry_is_not_ready_at_once(
    denied: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Within two seconds of lost permissions the status is not ready and gives the reason; the log
    reports it once, then every 10 minutes, then that it is over. No agent is stopped. The watch
    alone would not notice: it is waiting."""

    def logged() -> int:
        return sum("can't be read" in record.getMessage() for record in caplog.records)

    async def scenario(made: World) -> None:
        caplog.set_level(logging.WARNING)
        made.line.denied = denied
        await asyncio.sleep(2.0)
        status = made.fleet.views.status()
        assert status["ready"] is False
        assert "denied" in str(status["reason"])
        assert made.metric("registry_unreadable") == 1
        await asyncio.sleep(590.0)  # with many reads of the scheduler in between
        assert "denied" in str(made.fleet.views.status()["reason"])
        assert logged() == 1
        await asyncio.sleep(20.0)
        assert logged() == 2
        made.line.denied = "nothing"
        await asyncio.sleep(3.0)
        assert made.fleet.readiness.ready
        assert made.fleet.views.status()["reason"] == ""
        assert made.metric("registry_unreadable") == 0
        assert made.events() == ["registry.unreadable", "registry.readable"]
        assert logged() == 3
        assert sum(not job.dead for job in made.cluster.jobs.values()) == 3

    played(scenario)


def test_an_outage_of_the_registry_stays_ready_and_says_why() -> None:
    """If a registry does not answer for a while, nothing changes; only the reason and the metric
    report it."""

    async def scenario(made: World) -> None:
        made.line.error, made.line.denied = TransientError("no leader"), "registry"
        await asyncio.sleep(60.0)
        assert made.fleet.readiness.ready
        assert "no leader" in str(made.fleet.views.status()["reason"])
        assert made.metric("registry_unreadable") == 1
        assert made.events() == []
        made.line.denied = "nothing"
        await asyncio.sleep(3.0)
        assert made.fleet.views.status()["reason"] == ""

    played(scenario)


def test_a_document_of_another_version_is_not_a_wiped_registry() -> None:
    """Unreadable content makes the registry unreadable, and no import is suggested."""

    async def scenario(made: World) -> None:
        made.line.error, made.line.denied = UserError("version 9"), "registry.document"
        await asyncio.sleep(2.0)
        assert not made.fleet.readiness.ready
        assert "import" not in str(made.fleet.views.status()["reason"])
        assert made.events() == ["registry.unreadable"]

    played(scenario)

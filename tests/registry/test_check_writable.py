"""A registry that can be read but not written is detected before anything has to be written."""

from __future__ import annotations

import logging
import sqlite3
import uuid
from collections.abc import Awaitable, Callable

import aiohttp
import pytest

from nomad_watchdog.clients.consul import ConsulAccess, ConsulClient
from nomad_watchdog.clock import SystemClock
from nomad_watchdog.controllers.registry_writes import RegistryWrites
from nomad_watchdog.errors import DeniedError, TransientError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import Limits
from nomad_watchdog.registry import Registry, RegistryDocument
from nomad_watchdog.registry.consul import ConsulRegistry
from servers.consul import ConsulServer
from tests.registry.conftest import Store


async def test_the_check_writes_nothing(store: Store) -> None:
    """In every store it neither creates a document nor changes the index, however often it runs."""
    registry = store.open()
    await registry.initialise()
    fleet = Fleet(registry, Limits(), SystemClock())
    before = (await registry.read()).index
    writes = RegistryWrites(fleet, Metrics())
    await writes.check()
    await writes.check()
    assert fleet.readiness.registry_unwritable == ""
    assert (await registry.document("write-check")) == RegistryDocument()
    assert (await registry.read()).index == before
    if not store.address:
        with sqlite3.connect(store.path) as db:
            names = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
        db.close()
        assert "document" not in names


async def test_the_check_adds_no_entry_to_consuls_log(consul: ConsulServer) -> None:
    """Of five rounds of ten checks on real Consul, the quietest one leaves the raft index unchanged; ten lost
    compare-and-sets of a document raise it by at least ten."""
    client = ConsulClient(ConsulAccess(address=consul.http_addr))
    registry = ConsulRegistry(client=client, prefix=f"test-{uuid.uuid4()}")
    async with aiohttp.ClientSession(consul.http_addr) as http:

        async def raft_index() -> int:
            async with http.get("/v1/agent/self") as answer:
                return int((await answer.json())["Stats"]["raft"]["last_log_index"])

        async def entries(call: Callable[[], Awaitable[object]]) -> int:
            before = await raft_index()
            for _ in range(10):
                await call()
            return await raft_index() - before

        await registry.initialise()
        lost = RegistryDocument(b"{}", 1)
        assert min([await entries(registry.check_writable) for _ in range(5)]) == 0
        assert await entries(lambda: registry.commit_document("write-check", lost)) >= 10
    await client.close()


async def test_a_refusal_is_shown_until_it_is_over(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One log line and one event when it begins and when it ends; a timeout changes nothing."""
    fleet, metrics = Fleet(registry, Limits(), SystemClock()), Metrics()
    fleet.readiness.event.set()
    writes = RegistryWrites(fleet, metrics)
    answer: list[Exception] = [TransientError("no answer")]

    async def refuse() -> None:
        if answer:
            raise answer[0]

    monkeypatch.setattr(registry, "check_writable", refuse)
    with caplog.at_level(logging.WARNING):
        await writes.check()
        assert fleet.readiness.ready
        answer[0] = DeniedError("Consul: permission denied")
        await writes.check()
        await writes.check()
        assert not fleet.readiness.ready
        assert "permission denied" in fleet.readiness.reason
        assert b"nomad_watchdog_registry_unwritable 1.0" in metrics.render()
        answer[0] = TransientError("no answer")
        await writes.check()
        assert not fleet.readiness.ready, "no answer does not give a right back"
        answer.clear()
        await writes.check()
    assert fleet.readiness.ready
    assert b"nomad_watchdog_registry_unwritable 0.0" in metrics.render()
    kinds = [event.kind for event in fleet.events.after(0, 10)[0]]
    assert kinds == ["registry.unwritable", "registry.writable"]
    assert len(caplog.records) == 2

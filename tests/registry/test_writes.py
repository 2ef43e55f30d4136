"""A registry that can be read and not written is noticed before anything is asked of it."""

from __future__ import annotations

import logging

import pytest

from nomad_watchdog.clock import SystemClock
from nomad_watchdog.controllers.registry_writes import RegistryWrites
from nomad_watchdog.errors import DeniedError, TransientError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import Limits
from nomad_watchdog.registry import Registry, RegistryDocument


async def test_the_check_writes_nothing(registry: Registry) -> None:
    """In every store it neither makes a document nor moves the index, however often it is made."""
    fleet = Fleet(registry, Limits(), SystemClock())
    before = (await registry.read()).index
    writes = RegistryWrites(fleet, Metrics())
    await writes.check()
    await writes.check()
    assert fleet.readiness.registry_unwritable == ""
    assert (await registry.document("write-check")) == RegistryDocument()
    assert (await registry.read()).index == before


async def test_a_refusal_is_shown_until_it_is_over(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One log line and one event when it begins and when it is over; no answer in time says nothing."""
    fleet, metrics = Fleet(registry, Limits(), SystemClock()), Metrics()
    fleet.readiness.event.set()
    writes = RegistryWrites(fleet, metrics)
    answer: list[Exception] = [TransientError("no answer")]

    async def refuse(_name: str, _document: RegistryDocument) -> RegistryDocument | None:
        if answer:
            raise answer[0]
        return None

    monkeypatch.setattr(registry, "commit_document", refuse)
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

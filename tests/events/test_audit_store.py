"""Audit events have their own ring and file, and each actor has its own share."""

from __future__ import annotations

import json
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from nomad_watchdog.clock import SystemClock
from nomad_watchdog.events import _sql as sql
from nomad_watchdog.events import log as history_module
from nomad_watchdog.events.audit_store import SplitStore
from nomad_watchdog.events.device_limits import AT_ONCE, LEFT_OUT, PER_S, DeviceLimits
from nomad_watchdog.events.log import Event, EventFilter, EventLog
from nomad_watchdog.events.store import EventStore
from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.model import Monotonic, WallTime

AUDITS = EventFilter(kind="audit.")


class Clock(SystemClock):
    """Time that the test sets."""

    at = 0.0

    def monotonic(self) -> Monotonic:
        return Monotonic(self.at)


def see(history: EventLog, kind: str, actor: str = "token:a", device: str = "pump") -> Event:
    """Add an event with the current time."""
    name = DeviceId(device)
    data = {"actor": actor}
    return history.add(
        at=WallTime(time.time()), kind=kind, device_id=name, slug=slug_of(name), text="t", data=data
    )


def store_in(folder: Path) -> SplitStore:
    """Two files, small enough to fill up."""
    return SplitStore(
        EventStore(folder / "events.db", origin="o", max_events=1_000),
        EventStore(folder / "audit.db", origin="o", max_events=1_000, per_actor=True),
    )


@pytest.mark.parametrize("stored", [True, False], ids=["on disk", "in memory only"])
async def test_no_other_event_displaces_an_audit_event(tmp_path: Path, stored: bool) -> None:
    """More other events than ring and file hold displace no audit event and keep their order, even if none of them can
    be stored, and also in the next run."""
    store = store_in(tmp_path)
    history = EventLog("o", store if stored else None)
    if stored:
        await store.open()
    first = see(history, "audit.register")
    for _ in range(history_module.MAX_EVENTS + 5):
        see(history, "repair.failed")
    last = see(history, "audit.pause")
    assert [e.seq for e in (await history.page(0, 10, AUDITS))[0]] == [first.seq, last.seq]
    page, following = await history.page(0, 3)
    assert page[0].seq == first.seq
    assert following == page[-1].seq
    seqs = [event.seq for event in history.recent()]
    assert seqs == sorted(seqs)
    assert seqs[0] == first.seq
    if not stored:
        return
    await store.close()
    again = store_in(tmp_path)
    found = await again.open()
    later = EventLog("o", again)
    later.resume(found.seq, found.events)
    assert found.seq >= last.seq
    assert [e.seq for e in (await later.page(0, 10, AUDITS))[0]] == [first.seq, last.seq]
    await again.close()


async def test_no_actor_displaces_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token with many changes displaces only its own audit events, in memory and on disk."""
    monkeypatch.setattr(history_module, "MAX_PER_ACTOR", 50)
    store = store_in(tmp_path)
    await store.open()
    history = EventLog("o", store)
    mine = see(history, "audit.pause", "token:operator")
    for _ in range(2_500):
        see(history, "audit.register", "token:device")
    await store.close()
    again = store_in(tmp_path)
    await again.open()
    assert len(history._audit.events) == 51
    found, _ = await again.select(0, 10**9, 10_000, AUDITS)
    await again.close()
    assert found[0].seq == mine.seq
    assert len(found) <= 1_001 + sql.TAIL


async def test_an_event_that_is_too_long_keeps_its_actor(tmp_path: Path) -> None:
    """Bulk requests with long IDs make events that are cut. They displace no such event of another actor, and the next
    run knows who made them."""
    path, ids = tmp_path / "audit.db", ["\N{SNOWMAN}" * 42] * 20
    store = EventStore(path, origin="o", max_events=100, per_actor=True)
    await store.open()
    history = EventLog("o", store)
    for actor in ["token:operator"] + ["token:device"] * 200:
        history.add(
            at=WallTime(time.time()), kind="audit.bulk", device_id="", slug=slug_of(DeviceId("a")),
            text="t", data={"actor": actor, "devices": ids},
        )  # fmt: skip
    await store.close()
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        sql.rotate_actors(db, 100)
        rows = [json.loads(row) for (row,) in db.execute("SELECT data FROM event ORDER BY seq")]
    assert all("cut" in row for row in rows)
    actors = [row["actor"] for row in rows]
    assert actors == ["token:operator"] + ["token:device"] * 100


async def test_no_number_stops_the_store_or_its_rotation(tmp_path: Path) -> None:
    """Numbers that are not JSON, or of any size, are stored in some form, and so are the events after them. A row that
    an earlier version wrote with them, or a damaged one, does not keep others from being stored and deleted."""
    path = tmp_path / "audit.db"
    name = DeviceId("pump")
    for data in ({"x": float("nan")}, {"x": [float("inf")]}, {"x": 2**70}, {"x": 10**5_000}):
        store = EventStore(path, origin="o", max_events=100, per_actor=True)
        found = await store.open()  # the first events of the store also delete old ones
        history = EventLog("o", store)
        history.resume(found.seq, found.events)
        history.add(
            at=WallTime(time.time()),
            kind="audit.pause",
            device_id=name,
            slug=slug_of(name),
            text="t",
            data=data,
        )
        for _ in range(5):
            see(history, "audit.pause")
        await store.close()
        with closing(sqlite3.connect(path, isolation_level=None)) as db:
            rows = [row for (row,) in db.execute("SELECT data FROM event ORDER BY seq")][-6:]
            first, *others = [json.loads(row, parse_constant=pytest.fail) for row in rows]
            assert first
            assert first.keys() <= {"x", "cut"}
            assert others == [{"actor": "token:a"}] * 5
            db.execute("UPDATE event SET data = '{\"x\": NaN}' WHERE seq % 2")
            db.execute("UPDATE event SET data = '{' WHERE seq % 3 = 0")
            sql.rotate_actors(db, 2)
            assert db.execute("SELECT count(*) FROM event").fetchone()[0] <= 4


def test_a_device_has_a_bound_and_its_last_state_is_published() -> None:
    """Events beyond the device's limit are counted. The latest verdict waits until there is room, then one event states
    how many were left out. Other devices are not affected."""
    history, clock = EventLog(), Clock()
    allowance = DeviceLimits(history, clock)

    def add(kind: str, device: str = "pump") -> Event | None:
        name = DeviceId(device)
        return allowance.add(
            at=WallTime(0.0), kind=kind, device_id=name, slug=slug_of(name), text="t", data={}
        )

    assert all(add("repair.failed") for _ in range(AT_ONCE))
    assert not any(add("repair.failed") for _ in range(5))
    assert not add("verdict.offline")
    assert not add("verdict.watched")
    assert add("verdict.offline", "other")
    assert allowance.total == 6
    allowance.settle()
    assert len(history.of_device(slug_of(DeviceId("pump")))) > 0
    clock.at += 3 / PER_S
    allowance.settle()
    last = history.of_device(slug_of(DeviceId("pump")))[-2:]
    assert [one.kind for one in last] == ["verdict.watched", LEFT_OUT]
    assert last[1].data["count"] == 6
    assert add("verdict.offline") is not None

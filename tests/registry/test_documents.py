"""Documents next to the records, the same over SQLite and a real Consul; and old and new records."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomad_watchdog.clock import SystemClock
from nomad_watchdog.core.pauses import Pause, Target
from nomad_watchdog.errors import UserError
from nomad_watchdog.fleet.pauses import FORMAT, Pauses
from nomad_watchdog.model import Departure, Presence, WallTime
from nomad_watchdog.registry import MAX_DOCUMENT, Registry, RegistryDocument, codec
from nomad_watchdog.registry.sqlite import SqliteRegistry
from tests.registry.conftest import Store
from tests.registry.records import record


async def test_a_document_is_created_changed_and_never_overwritten_blindly(
    registry: Registry, store: Store
) -> None:
    """Only the index that was read allows a change; another handle reads what was stored; no record appears."""
    assert await registry.document("pauses") == RegistryDocument()
    first = await registry.commit_document("pauses", RegistryDocument(b"one"))
    assert first is not None
    assert await registry.commit_document("pauses", RegistryDocument(b"blind")) is None
    second = await registry.commit_document("pauses", replace(first, body=b"two"))
    assert second is not None
    assert second.index > first.index
    assert await registry.commit_document("pauses", replace(first, body=b"late")) is None
    assert await registry.commit_document("other", RegistryDocument(b"x", second.index)) is None

    assert await store.open().document("pauses") == second
    assert await registry.document("other") == RegistryDocument()
    assert (await registry.read()).records == {}


async def test_documents_leave_records_alone(registry: Registry) -> None:
    """A record and a document with the same name are independent."""
    (stored,) = await registry.commit([record("pauses")])
    assert stored is not None
    assert await registry.commit_document("pauses", RegistryDocument(b"x")) is not None
    assert (await registry.read()).records == {stored.slug: stored}
    assert await registry.get(stored.slug) == stored


async def test_of_many_writers_of_a_document_each_change_counts(store: Store) -> None:
    """Eight handles that add a pause at once lose none."""
    first = store.open()
    await first.initialise()
    handles = [Pauses(store.open(), SystemClock()) for _ in range(4)]

    async def add(number: int) -> None:
        target = Target(frozenset({f"d{number}"}))
        pause = Pause(f"p{number}", target, WallTime(0.0), None, "", "")
        await handles[number % len(handles)].add(pause)

    await asyncio.gather(*(add(n) for n in range(4)))
    await asyncio.gather(*(add(n) for n in range(4, 8)))

    assert await handles[0].refresh()
    assert {p.id for p in handles[0].all} == {f"p{n}" for n in range(8)}


async def test_a_store_that_was_never_initialised_has_no_documents(store: Store) -> None:
    """Neither a read nor a write treats it as an empty registry."""
    with pytest.raises(UserError, match="init"):
        await store.open().document("pauses")
    with pytest.raises(UserError, match="init"):
        await store.open().commit_document("pauses", RegistryDocument(b"x"))


async def test_names_and_sizes_are_bounded(registry: Registry) -> None:
    """An invalid name, and a body that is too large, are rejected before anything is sent."""
    for name in ("", "A", "a/b", "..", "a" * 33):
        with pytest.raises(UserError, match="document name"):
            await registry.document(name)
    with pytest.raises(UserError, match="at most 65536"):
        await registry.commit_document("pauses", RegistryDocument(b"x" * (MAX_DOCUMENT + 1)))


async def test_a_document_that_was_spoilt_leaves_the_last_good_pauses(registry: Registry) -> None:
    """The pauses in force stay, and the error is reported; after the repair the document is read again."""
    pauses = Pauses(registry, SystemClock())
    await pauses.add(Pause("p", Target(agent_class="default"), WallTime(0.0), None, "", ""))
    good = await registry.document("pauses")
    spoilt = await registry.commit_document("pauses", replace(good, body=b'{"v": 1}'))
    assert spoilt is not None

    await pauses.refresh()
    assert [p.id for p in pauses.in_force()] == ["p"]
    assert "can't be used" in pauses.problem
    assert await registry.commit_document("pauses", replace(spoilt, body=good.body)) is not None
    await pauses.refresh()
    assert pauses.problem == ""


async def test_an_sqlite_file_without_documents_is_as_it_was(tmp_path: Path) -> None:
    """Reading creates no table: a version without documents finds the file as it made it."""
    path = tmp_path / "registry.db"
    registry = SqliteRegistry(path=path)
    await registry.initialise()
    await registry.document("pauses")
    await registry.close()
    with sqlite3.connect(path) as db:
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
    db.close()

    assert "document" not in tables


texts = st.text(max_size=8)


@given(
    st.lists(
        st.builds(
            Pause,
            id=texts,
            target=st.builds(
                Target,
                devices=st.frozensets(texts, max_size=3),
                agent_class=texts,
                labels=st.dictionaries(texts, texts, max_size=2),
            ),
            begins=st.floats(0, 1e10).map(WallTime),
            ends=st.none() | st.floats(0, 1e10).map(WallTime),
            reason=texts,
            by=texts,
            window=st.booleans(),
        ),
        max_size=4,
    )
)
def test_pauses_are_read_as_they_were_written(made: list[Pause]) -> None:
    """Pauses with any text are read as written."""
    assert FORMAT.decode(FORMAT.encode(tuple(made))) == tuple(made)


@given(
    st.none() | st.floats(0, 1e6),
    texts.filter(str.isprintable),
    st.sampled_from(Departure),
    st.sampled_from(Presence),
)
def test_a_record_says_how_a_device_is_there(
    ttl_s: float | None, source: str, left: Departure, presence: Presence
) -> None:
    """Lifetime, source and departure are stored."""
    plain = record("a")
    made = replace(
        plain,
        device=replace(plain.device, ttl_s=ttl_s),
        source=source,
        left=left,
        presence=presence,
    )

    assert codec.decode(codec.encode(made)) == made


def test_an_old_record_is_read_and_an_unchanged_one_is_written_as_before() -> None:
    """A record without the new fields has the same bytes as in the version that did not know them."""
    old = {
        "address": "127.0.0.1",
        "agent_class": "default",
        "changed_at": 1.5,
        "epoch": 0,
        "generation": 1,
        "id": "a",
        "instance": "",
        "labels": {"": "a", "site": "näh ☃"},
        "presence": "present",
        "slug": record("a").slug,
        "v": 1,
    }
    body = json.dumps(old, ensure_ascii=False, separators=(",", ":")).encode()

    assert codec.decode(body) == record("a")
    assert codec.encode(record("a")) == body


@pytest.mark.parametrize(
    "odd", [{"ttl_s": -1}, {"ttl_s": "90s"}, {"left": "lost"}, {"source": 1}, {"left": None}]
)
def test_an_odd_new_field_is_poison(odd: dict[str, object]) -> None:
    """A field that this version would not write is not interpreted."""
    body = json.loads(codec.encode(record("a"))) | odd

    with pytest.raises(codec.PoisonError):
        codec.decode(json.dumps(body).encode())

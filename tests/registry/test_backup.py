"""Restoring a backup brings back its content and never lowers an epoch."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomad_watchdog.core import presence
from nomad_watchdog.core.tombstones import EpochFloor
from nomad_watchdog.errors import UserError
from nomad_watchdog.model import NEVER, DeviceRecord, Epoch, Presence
from nomad_watchdog.registry import Registry, backup
from nomad_watchdog.registry.epoch_floor import FLOOR, floor_of, raise_floor
from tests.registry.conftest import Store
from tests.registry.records import hostile_ids, record


async def fill(registry: Registry, count: int = 20) -> list[DeviceRecord]:
    wanted = [
        replace(
            record(text, epoch=number),
            presence=Presence.ABSENT if number % 5 == 0 else Presence.PRESENT,
            instance=f"i-{number}",
        )
        for number, text in enumerate(hostile_ids(count)[:count])
    ]
    stored = await registry.commit(wanted)
    return [one for one in stored if one is not None]


def plain(records: list[DeviceRecord]) -> list[DeviceRecord]:
    return sorted((replace(one, index=0) for one in records), key=lambda one: one.slug)


async def whole(registry: Registry) -> list[DeviceRecord]:
    return plain(list((await registry.read()).records.values()))


async def test_a_new_store_takes_over_the_whole_backup(registry: Registry, store: Store) -> None:
    """Records, tombstones, epochs, accepted instances and the installation are restored unchanged."""
    kept = plain(await fill(registry))
    text = "\n".join(await backup.lines(registry)) + "\n"
    installation, records, _ = backup.parse(io.StringIO(text))
    fresh = Store(store.path.parent / "other", store.address)
    fresh.path.parent.mkdir()
    try:
        new = fresh.open()
        done = await backup.restore(new, installation, records)
        assert (done.records, done.changed) == (20, 20)
        assert await whole(new) == kept
        assert await new.installation() == await registry.installation()
    finally:
        await fresh.close()


async def test_s1_an_old_backup_lowers_no_epoch_and_undoes_no_newer_wish(
    registry: Registry,
) -> None:
    """Changes after the backup stay: higher epochs, and a device that has left since."""
    before = await fill(registry)
    lines = await backup.lines(registry)
    moved = [replace(one, epoch=Epoch(one.epoch + 7), instance="new") for one in before[:5]]
    left = [replace(before[6], presence=Presence.ABSENT, generation=2)]
    await registry.commit([*moved, *left])
    now = await whole(registry)
    done = await backup.restore(registry, *backup.parse(io.StringIO("\n".join(lines))))
    assert done.changed == 0
    assert await whole(registry) == now


async def test_s1_no_epoch_of_a_record_that_was_deleted_since_comes_back(
    registry: Registry,
) -> None:
    """An epoch up to the floor may have been used again since: a device whose record was deleted is restored without
    one, and so is one that was registered again and has none yet. Records above the floor, or never deleted, stay."""
    saved = await fill(registry)
    parsed = backup.parse(io.StringIO("\n".join(await backup.lines(registry))))
    gone, again, kept, above = saved[6], saved[7], saved[8], saved[16]
    assert await raise_floor(registry, EpochFloor(Epoch(10), 1))
    assert await registry.forget([gone, again, above]) == [True] * 3
    assert await registry.commit([record(again.device.id)]) != [None]
    assert (await backup.restore(registry, *parsed, dry_run=True)).changed == 2
    assert (await backup.restore(registry, *parsed)).changed == 2
    found = {one.slug: one for one in await whole(registry)}
    assert found[gone.slug] == replace(gone, epoch=NEVER, instance="", index=0)
    assert (found[again.slug].epoch, found[again.slug].instance) == (NEVER, "")
    for one in (kept, above):
        assert found[one.slug] == replace(one, index=0)
    assert (await backup.restore(registry, *parsed)).changed == 0


async def test_a_wiped_registry_takes_epochs_below_the_floor_of_the_backup(
    registry: Registry, store: Store
) -> None:
    """Records below the backup's floor are restored with their epochs, and so is the floor."""
    await fill(registry)
    assert await raise_floor(registry, EpochFloor(Epoch(50), 3))
    kept = await whole(registry)
    lines = await backup.lines(registry)
    fresh = Store(store.path.parent / "other", store.address)
    fresh.path.parent.mkdir()
    try:
        new = fresh.open()
        done = await backup.restore(new, *backup.parse(io.StringIO("\n".join(lines))))
        assert done.changed == len(kept)
        assert await whole(new) == kept
        assert floor_of(await new.document(FLOOR)) == EpochFloor(Epoch(50), 3)
    finally:
        await fresh.close()


async def test_a_dry_run_writes_nothing(registry: Registry, store: Store) -> None:
    """It reports how many records would change, even for a store that does not exist yet."""
    await fill(registry)
    parsed = backup.parse(io.StringIO("\n".join(await backup.lines(registry))))
    fresh = Store(store.path.parent / "other", store.address)
    try:
        new = fresh.open()
        done = await backup.restore(new, *parsed, dry_run=True)
        assert done.changed == 20
        with pytest.raises(UserError):
            await new.installation()
    finally:
        await fresh.close()


async def test_two_installations_are_not_mixed(registry: Registry) -> None:
    """A backup of another installation is rejected, with both IDs."""
    await fill(registry)
    _, records, _ = backup.parse(io.StringIO("\n".join(await backup.lines(registry))))
    other = "00000000-0000-4000-8000-000000000000"
    with pytest.raises(UserError, match=other):
        await backup.restore(registry, other, records)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: lines[1:], "line 1: this is not a registry backup"),
        (lambda lines: lines[:-1], "not complete: 3 records of 4"),
        (lambda lines: [*lines, lines[-1]], "line 6: .* occurs twice"),
        (lambda lines: [*lines[:2], "{", *lines[3:]], "line 3: it is not JSON"),
        (
            lambda lines: [*lines[:2], lines[2].replace('"epoch":', '"epoch":-1'), *lines[3:]],
            "line 3",
        ),
        (lambda _: [], "line 1: this is not a registry backup"),
    ],
)
async def test_a_damaged_backup_is_refused_whole(
    registry: Registry, change: object, said: str
) -> None:
    """A backup that is cut, contains duplicates or was edited is rejected with its line before anything is written."""
    await fill(registry, 4)
    lines = await backup.lines(registry)
    assert json.loads(lines[0])["records"] == 4
    with pytest.raises(UserError, match=said):
        backup.parse(io.StringIO("\n".join(change(lines))))  # type: ignore[operator]


RECORDS = st.builds(
    lambda generation, epoch, instance, gone: replace(
        record("pump", epoch=epoch),
        generation=generation,
        instance=instance,
        presence=Presence.ABSENT if gone else Presence.PRESENT,
    ),
    st.integers(1, 5),
    st.integers(0, 5),
    st.sampled_from(["", "a", "b"]),
    st.booleans(),
)


@given(RECORDS, RECORDS)
def test_s1_restoring_never_lowers_anything(stored: DeviceRecord, saved: DeviceRecord) -> None:
    """Neither epoch nor generation goes back, the store's own instance stays at its epoch, and restoring twice has the
    same result as once."""
    made = presence.restore(stored, saved) or stored
    assert made.epoch == max(stored.epoch, saved.epoch)
    assert made.generation == max(stored.generation, saved.generation)
    if stored.epoch >= saved.epoch:
        assert made.instance == stored.instance
    assert presence.restore(made, saved) is None

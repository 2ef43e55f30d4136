"""Detection of a registry that went back in time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nomad_watchdog.core import registry_rollback
from nomad_watchdog.ids import DeviceId, Slug, slug_of
from nomad_watchdog.model import DeviceRecord
from tests.registry.records import record

NAMES = [f"cam {number}" for number in range(5)]
Store = dict[Slug, DeviceRecord]
WRITES = st.lists(st.sampled_from(NAMES), max_size=12)


def written(store: Store, index: int, names: list[str]) -> int:
    """Write these one after the other; return the index of the last."""
    for name in names:
        index += 1
        store[slug_of(DeviceId(name))] = record(name, index=index)
    return index


@given(WRITES, WRITES, WRITES)
def test_one_history_is_never_a_setback(first: list[str], ours: list[str], more: list[str]) -> None:
    """Later snapshots of one history are no rollback, whatever of our own writes is known already."""
    store: Store = {}
    seen_at = written(store, 0, first)
    known = dict(store)
    reached = written(known, seen_at, ours)
    store = dict(known)
    index = written(store, reached, more)

    assert registry_rollback.of(known, store, seen_at, index) is None
    assert registry_rollback.of(known, store, reached, index) is None


@given(WRITES, WRITES.filter(bool), WRITES)
def test_a_restored_backup_is_a_setback_that_names_what_was_lost(
    kept: list[str], lost: list[str], later: list[str]
) -> None:
    """Once known records are lost, each such device counts as older or as missing; later writes do not hide it, unless
    they replace all of them, or leave only missing records and a higher index."""
    backup: Store = {}
    saved_at = written(backup, 0, kept)
    known = dict(backup)
    reached = written(known, saved_at, lost)
    # Consul continues its index; an untouched store has the index of its last record.
    shown = dict(backup)
    index = written(shown, reached, later) if later else saved_at

    found = registry_rollback.of(known, shown, reached, index)

    changed = {slug_of(DeviceId(name)) for name in lost}
    older = {s for s in changed if s in shown and shown[s].index < known[s].index}
    missing = {s for s in changed if s not in shown}
    if older or (missing and index < reached):
        assert found is not None
        assert {one.slug for one in found.older} == older
        assert {one.slug for one in found.missing} == missing
    else:
        assert found is None


def test_the_text_counts_and_names_devices() -> None:
    """The text states one device, many devices and the pauses."""
    one = (record("cam 1"),)
    many = tuple(record(f"pump {number:02}") for number in range(25))

    text = registry_rollback.RegistryRollback(one, many, pauses=True).text

    assert "1 device has an older record than before (cam 1)" in text
    assert "25 devices have no record any more (pump 00, " in text
    assert text.count("pump") == registry_rollback.MAX_NAMED
    assert text.partition("; register")[0].endswith(", ...); the pauses are older than before")

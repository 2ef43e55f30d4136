"""The contract of `nomad_watchdog.schedulers.Scheduler` as a test suite, the same for every backend.

It does not use pytest (as trio's `check_one_way_stream`): a maker returns a `Rig`, `check_scheduler` runs all checks,
and a test suite can parametrize over `CHECKS`. Each check uses its own device ids and retires them, so one backend can
serve all checks. A violation of the contract raises AssertionError with a message.
"""

from __future__ import annotations

import asyncio
import unicodedata
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import aclosing
from dataclasses import replace
from typing import Final

from nomad_watchdog.errors import TransientError
from nomad_watchdog.ids import DeviceId, Slug, slug_of
from nomad_watchdog.model import (
    DeviceRecord,
    Epoch,
    PlacementState,
)
from nomad_watchdog.schedulers import Hint, Snapshot, unchanged_since
from nomad_watchdog.testing.rig import Check, Maker, Rig, bench_of, hostile_device_ids, record_of

__all__ = ["CHECKS", "Check", "Maker", "Rig", "check_scheduler", "hostile_device_ids", "record_of"]


async def prepare_is_idempotent(rig: Rig) -> None:
    """Preparing again, from another instance too, changes nothing and places nothing."""
    async with bench_of(rig) as bench:
        record, before = await bench.start()
        other = rig.scheduler()
        try:
            await other.prepare([bench.spec])
            await bench.scheduler.prepare([bench.spec], shards=())
            await bench.scheduler.prepare([bench.spec])
        finally:
            await other.close()
        after = await bench.running(record)
        assert after.ref == before.ref, "a second prepare replaced a running placement"


async def a_class_can_have_a_second_spec(rig: Rig) -> None:
    """Of two specs of a class each device gets its own, and an epoch that was started with one of them is not started
    again with the other (S2)."""
    async with bench_of(rig) as bench:
        trial = replace(
            bench.spec, spec_hash=f"{bench.spec.spec_hash[:8]}trial", version="0.0.0-trial"
        )
        await bench.scheduler.prepare([bench.spec], trials=[trial])
        usual, tried = bench.device(), bench.device()
        await bench.scheduler.ensure(usual, Epoch(1), bench.spec)
        await bench.scheduler.ensure(tried, Epoch(1), trial)
        before = await bench.running(tried)
        found = (await bench.running(usual)).spec_hash, before.spec_hash
        assert found == (bench.spec.spec_hash, trial.spec_hash), f"the placements have {found}"
        await bench.scheduler.ensure(tried, Epoch(1), bench.spec)
        after = await bench.running(tried)
        assert after.ref == before.ref, "one epoch was started with both specs"
        running = await rig.processes(tried.slug)
        assert len(running) == 1, f"one epoch that was started with both specs has {running}"


async def ensure_shows_in_snapshot(rig: Rig) -> None:
    """A snapshot at the returned index or later includes the placement with all its fields."""
    async with bench_of(rig) as bench:
        record = bench.device()
        index = await bench.scheduler.ensure(record, Epoch(7), bench.spec)
        assert index > 0, f"ensure returned index {index}; it must be positive"

        async def included() -> bool:
            snapshot = await bench.scheduler.snapshot()
            if snapshot.index < index:
                return False
            assert record.slug in snapshot.placements, (
                f"ensure returned index {index}, but the snapshot at {snapshot.index} lacks the placement"
            )
            return True

        await bench.until("a snapshot at the index that ensure returned", included)
        found = await bench.running(record)
        actual = (found.slug, found.device_id, found.epoch, found.agent_class, found.spec_hash)
        wanted = (record.slug, record.device.id, 7, bench.spec.agent_class, bench.spec.spec_hash)
        assert actual == wanted, f"the placement has {actual}, expected {wanted}"
        assert len(found.instances) == 1, f"a running placement has instances {found.instances}"


async def ensure_twice_is_one(rig: Rig) -> None:
    """The same ensure twice is one placement and one process (S5)."""
    async with bench_of(rig) as bench:
        record, first = await bench.start()
        before = await rig.processes(record.slug)
        await bench.scheduler.ensure(record, Epoch(1), bench.spec)
        again = await bench.running(record)
        assert again.ref == first.ref, "the second ensure made another placement"
        assert await rig.processes(record.slug) == before, "the second ensure restarted the agent"


async def ensure_raced_is_one(rig: Rig) -> None:
    """Two instances with 16 tasks each end with one placement and one process (S3, S5)."""
    async with bench_of(rig) as bench:
        other = rig.scheduler()
        try:
            await other.prepare([bench.spec])
            record = bench.device()
            calls = [
                one.ensure(record, Epoch(1), bench.spec)
                for one in (bench.scheduler, other)
                for _ in range(16)
            ]
            answers = await asyncio.gather(*calls, return_exceptions=True)
        finally:
            await other.close()
        wrong = [one for one in answers if isinstance(one, BaseException)]
        wrong = [one for one in wrong if not isinstance(one, TransientError)]
        assert not wrong, f"a raced ensure failed: {wrong[0]!r}"

        async def one_only() -> bool:
            await bench.scheduler.ensure(record, Epoch(1), bench.spec)
            return len(await bench.alive(record.slug)) == 1

        await bench.until("one placement after a race", one_only)
        await bench.running(record)


async def retire_is_graceful(rig: Rig) -> None:
    """Retire ends in DEAD without a process. Repeated, or for a placement that is gone, it is not an error."""
    async with bench_of(rig) as bench:
        record, placement = await bench.start()
        await bench.scheduler.retire(placement, rig.grace_s)
        await bench.scheduler.retire(placement, rig.grace_s)
        await bench.gone([record.slug])
        await bench.scheduler.retire(placement, rig.grace_s)
        dead = [one for one in await bench.of(record.slug) if one.state is PlacementState.DEAD]
        await bench.scheduler.sweep(dead)
        await bench.scheduler.retire(placement, rig.grace_s)
        # A scheduler may need a moment to detect that there is nothing to do.
        allowed = {PlacementState.DEAD, PlacementState.STOPPING}
        states = {one.state for one in await bench.of(record.slug)}
        assert states <= allowed, f"retiring something gone brought it back: {states}"
        await bench.gone([record.slug])


async def next_epoch_after_dead(rig: Rig) -> None:
    """After DEAD the device can be placed again at the next epoch."""
    async with bench_of(rig) as bench:
        record, placement = await bench.start()
        await bench.scheduler.retire(placement, rig.grace_s)
        await bench.gone([record.slug])
        await bench.scheduler.ensure(record, Epoch(2), bench.spec)
        found = await bench.running(record)
        assert found.epoch == 2, f"expected epoch 2, got {found.epoch}"
        assert found.instances != placement.instances, "the next epoch reused the instance id"


async def snapshot_only_is_a_part(rig: Rig) -> None:
    """snapshot(only=…) is the full snapshot restricted, absent slugs included."""
    async with bench_of(rig) as bench:
        started = [await bench.start(prefix) for prefix in ("d-1", "d-10")]
        absent = slug_of(DeviceId(f"absent-{uuid.uuid4()}"))
        only = frozenset({started[0][0].slug, absent})

        def key(seen: Snapshot, slug: Slug) -> set[tuple[str, int, str]]:
            return {(one.ref, one.epoch, one.state) for one in seen.placements.get(slug, ())}

        full = await bench.scheduler.snapshot()
        part = await bench.scheduler.snapshot(only=only)
        assert full.only is None, f"a full snapshot has only={full.only}"
        assert part.only == only, f"expected only={only}, the snapshot has {part.only}"
        assert set(part.placements) <= only, "a restricted snapshot has other devices"
        for slug in only:
            assert key(part, slug) == key(full, slug), f"part and whole differ for {slug}"


async def unchanged_since_is_never_wrong(rig: Rig) -> None:
    """`unchanged_since`, where a backend has it, is true only for the last full snapshot, and not after a start, a stop
    or the end of an agent."""
    async with bench_of(rig) as bench:
        first, placement = await bench.start("one")
        older = await bench.scheduler.snapshot()
        newer = await bench.scheduler.snapshot()
        assert not await unchanged_since(bench.scheduler, older), (
            "true for a snapshot that was not the last"
        )
        second = bench.device("two")
        index = await bench.scheduler.ensure(second, Epoch(1), bench.spec)
        assert not await unchanged_since(bench.scheduler, newer), "true after a start"

        async def included() -> bool:
            nonlocal newer
            newer = await bench.scheduler.snapshot()
            return newer.index >= index and second.slug in newer.placements

        await bench.until("the second device in a snapshot", included)
        await bench.scheduler.retire(placement, rig.grace_s)
        assert not await unchanged_since(bench.scheduler, newer), "true after a stop was requested"
        newer = await bench.scheduler.snapshot()
        await bench.gone([first.slug])
        seen = await bench.scheduler.snapshot(only=[first.slug])
        states = {one.state for one in seen.placements.get(first.slug, ())}
        if states != {one.state for one in newer.placements.get(first.slug, ())}:
            assert not await unchanged_since(bench.scheduler, newer), (
                "true after an agent has ended"
            )


async def snapshot_is_complete_or_raises(rig: Rig) -> None:
    """When the backend cannot be read, snapshot raises TransientError instead of being incomplete (S7)."""
    if rig.break_reads is None:
        return
    async with bench_of(rig) as bench:
        record, placement = await bench.start()
        async with rig.break_reads():
            try:
                seen = await bench.scheduler.snapshot()
            except TransientError:
                pass
            else:
                raise AssertionError(
                    f"reads are broken, but snapshot returned {len(seen.placements)} devices"
                )
        assert (await bench.running(record)).ref == placement.ref


async def _next(hints: AsyncIterator[Hint], slug: Slug) -> None:
    async for hint in hints:
        if hint.slugs is None or slug in hint.slugs:
            return
    raise AssertionError("watch ended by itself")


async def watch_hints(rig: Rig) -> None:
    """The first hint is a resync, every watcher gets a hint for a change, and closing leaves no task."""
    async with bench_of(rig) as bench:
        before = asyncio.all_tasks()
        async with aclosing(_generator(bench.scheduler.watch())) as one:
            async with aclosing(_generator(bench.scheduler.watch())) as two:
                async with asyncio.timeout(rig.timeout_s):
                    firsts = [await anext(one), await anext(two)]
                assert all(hint.slugs is None for hint in firsts), f"first hints were {firsts}"
                record = bench.device()
                await bench.scheduler.ensure(record, Epoch(1), bench.spec)
                async with asyncio.timeout(rig.timeout_s):
                    await asyncio.gather(_next(one, record.slug), _next(two, record.slug))
            await bench.retire_all()
            async with asyncio.timeout(rig.timeout_s):
                await _next(one, record.slug)

        async def tidy() -> bool:
            return not {task for task in asyncio.all_tasks() - before if "watch" in repr(task)}

        await bench.until("no task of a closed watch", tidy)


async def _generator(hints: AsyncIterator[Hint]) -> AsyncGenerator[Hint, None]:
    """Close the backend's iterator together with this generator."""
    try:
        async for hint in hints:
            yield hint
    finally:
        close = getattr(hints, "aclose", None)
        if close is not None:
            await close()


async def crash_is_restarted(rig: Rig) -> None:
    """The backend restarts a crashed agent at the same epoch: one placement, one process."""
    async with bench_of(rig) as bench:
        if rig.crash is None or not bench.scheduler.capabilities.restarts:
            return
        record, placement = await bench.start()
        before = await rig.processes(record.slug)
        await rig.crash(placement)

        async def replaced() -> bool:
            now = await rig.processes(record.slug)
            return len(now) == 1 and now != before

        await bench.until("a new process after the crash", replaced)
        after = await bench.running(record)
        assert (after.ref, after.epoch) == (placement.ref, placement.epoch), (
            "not the same placement"
        )
        assert after.instances == placement.instances, "a restart in place must keep the instance"


async def restart_of_ours_adopts(rig: Rig) -> None:
    """Closing the scheduler and creating another one neither loses nor restarts agents (L3)."""
    async with bench_of(rig) as bench:
        record, placement = await bench.start()
        before = await rig.processes(record.slug)
        await bench.scheduler.close()
        bench.scheduler = rig.scheduler()
        await bench.scheduler.prepare([bench.spec])
        after = await bench.running(record)
        assert (after.ref, after.instances) == (placement.ref, placement.instances), "not adopted"
        assert await rig.processes(record.slug) == before, "the agent was restarted"


async def failing_agent_has_reason(rig: Rig) -> None:
    """An agent that exits with 1 at once becomes RESTARTING or DEAD, with a reason and few restarts (S9)."""
    async with bench_of(rig, rig.failing_spec()) as bench:
        record = bench.device()
        await bench.scheduler.ensure(record, Epoch(1), bench.spec)

        async def has_reason() -> bool:
            found = await bench.of(record.slug)
            bad = {PlacementState.RESTARTING, PlacementState.DEAD}
            return bool(found) and found[0].state in bad and bool(found[0].reason)

        await bench.until("RESTARTING or DEAD, with a reason", has_reason)
        for one in await bench.of(record.slug):
            assert one.restarts <= 20, f"{one.restarts} restarts at once: no back-off"


async def hostile_ids_map_back(rig: Rig, count: int = 1000) -> None:
    """Every difficult id gets its own slug and is mapped back exactly (S11)."""
    ids = hostile_device_ids(count)
    assert len({unicodedata.normalize("NFC", one) for one in ids}) >= count - 1
    async with bench_of(rig, rig.scale_spec()) as bench:
        records = [record_of(one) for one in ids]
        bench.made.update(one.slug for one in records)
        limit = asyncio.Semaphore(16)

        async def ensure(record: DeviceRecord) -> int:
            async with limit:
                return await bench.scheduler.ensure(record, Epoch(1), bench.spec)

        index = max(await asyncio.gather(*(ensure(one) for one in records)))

        async def mapped() -> bool:
            seen = await bench.scheduler.snapshot()
            if seen.index < index:
                return False
            for one in records:
                found = {two.device_id for two in seen.placements.get(one.slug, ())}
                assert found == {one.device.id}, f"{one.device.id!r} came back as {found!r}"
            return True

        await bench.until("a snapshot of all hostile ids", mapped)


CHECKS: Final[dict[str, Check]] = {
    check.__name__: check
    for check in (
        prepare_is_idempotent,
        a_class_can_have_a_second_spec,
        ensure_shows_in_snapshot,
        ensure_twice_is_one,
        ensure_raced_is_one,
        retire_is_graceful,
        next_epoch_after_dead,
        snapshot_only_is_a_part,
        unchanged_since_is_never_wrong,
        snapshot_is_complete_or_raises,
        watch_hints,
        crash_is_restarted,
        restart_of_ours_adopts,
        failing_agent_has_reason,
        hostile_ids_map_back,
    )
}


async def check_scheduler(
    make: Maker, *, only: Collection[str] | None = None, hostile_ids: int = 1000
) -> list[str]:
    """Run the checks, each with its own rig. Returns the names of those that ran.

    Raises AssertionError for the first violation of the contract, and for an unknown name in `only`.
    """
    unknown = set(only or ()) - set(CHECKS)
    assert not unknown, f"no such check: {sorted(unknown)}; there are {sorted(CHECKS)}"
    done = []
    for name, check in CHECKS.items():
        if only is not None and name not in only:
            continue
        async with make() as rig:
            if name == hostile_ids_map_back.__name__:
                await hostile_ids_map_back(rig, hostile_ids)
            else:
                await check(rig)
        done.append(name)
    return done

"""A pass without any changes: cost per device compared with a bare comparison of two dicts.

The bare loop is the minimum for any reconciler: for each device, compare the observed with the desired
state. Both run alternately in one process, and the result is the median of the ratios.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Mapping

from bench.rows import Row
from nomad_watchdog.core.goals import Goals
from nomad_watchdog.core.planner import plan
from nomad_watchdog.ids import DeviceId, Slug, slug_of
from nomad_watchdog.model import (
    Device,
    DeviceRecord,
    Epoch,
    Limits,
    Placement,
    PlacementState,
    Presence,
    WallTime,
)


def world(
    count: int,
) -> tuple[dict[Slug, DeviceRecord], dict[Slug, tuple[Placement, ...]]]:
    records = {}
    placements: dict[Slug, tuple[Placement, ...]] = {}
    for n in range(count):
        device = Device(DeviceId(f"device-{n}"), "default", "10.0.0.1")
        slug = slug_of(device.id)
        records[slug] = DeviceRecord(
            slug, device, Presence.PRESENT, 1, Epoch(3), "i", WallTime(0.0), n + 1
        )
        placements[slug] = (
            Placement(
                slug, device.id, Epoch(3), "default", "hash", PlacementState.RUNNING, f"job-{n}"
            ),
        )
    return records, placements


def bare(
    desired: Mapping[Slug, tuple[int, str]], observed: Mapping[Slug, tuple[int, str]]
) -> list[Slug]:
    return [key for key, value in desired.items() if observed.get(key) != value]


def run() -> list[Row]:
    rows: list[Row] = []
    for count in (1_000, 10_000, 100_000):
        records, placements = world(count)
        desired = dict.fromkeys(records, (3, "hash"))
        observed = dict.fromkeys(records, (3, "hash"))
        limits = Limits()
        ratios, ours = [], []
        gc.collect()
        gc.disable()
        for _ in range(9):
            began = time.perf_counter()
            assert bare(desired, observed) == []
            middle = time.perf_counter()
            made = plan(records, placements, Goals({"default": "hash"}), limits)
            ended = time.perf_counter()
            assert made.actions == ()
            ratios.append((ended - middle) / (middle - began))
            ours.append((ended - middle) / count * 1e6)
        gc.enable()
        rows.append(
            Row(
                f"no-op pass, {count:,} devices ÷ bare dict diff",
                statistics.median(ratios),
                "×",
                floor="≤ 10",
                aim="≤ 2",
                note=f"{statistics.median(ours):.2f} µs a device; 0 API calls, 0 writes (pure)",
            )
        )
    return rows

"""Walks registry, Nomad, Consul and processes, and says which promise does not hold.

Everything is read from the stores themselves, nothing from what the control plane says of itself.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from nomad_watchdog.clients.consul import ConsulClient, ConsulSettings
from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.model import DeviceRecord, Presence
from nomad_watchdog.registry.consul import ConsulRegistry

LIVE = {"running", "pending"}


@dataclass(frozen=True, slots=True)
class AgentProcess:
    """One process that is an agent, as /proc has it."""

    pid: int
    slug: str
    instance: str
    epoch: int


def processes(root: Path) -> list[AgentProcess]:
    """The agents that run with a task folder below root."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError, KeyError):
            words = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
            values = dict(word.split("=", 1) for word in words if "=" in word)
            arguments = (entry / "cmdline").read_bytes()
            if values["WATCHDOG_CONFIG"].startswith(str(root)) and b"watchdog-agent" in arguments:
                found.append(
                    AgentProcess(
                        int(entry.name),
                        values["NOMAD_META_slug"],
                        values["NOMAD_ALLOC_ID"],
                        int(values["NOMAD_META_epoch"]),
                    )
                )
    return found


def doubled(root: Path) -> list[AgentProcess]:
    """Agents of devices that have more than one process at the same moment (S3)."""
    first = processes(root)
    counts = Counter(one.slug for one in first)
    suspects = [one for one in first if counts[one.slug] > 1]
    if not suspects:
        return []
    # /proc is not read in one moment: whoever has ended meanwhile was never beside the other.
    alive = {one.pid for one in processes(root)}
    still = [one for one in suspects if one.pid in alive]
    counts = Counter(one.slug for one in still)
    return [one for one in still if counts[one.slug] > 1]


async def records(consul: str) -> dict[str, DeviceRecord]:
    """The registry, read from Consul."""
    client = ConsulClient(ConsulSettings.from_env({}, address=consul))
    try:
        snapshot = await ConsulRegistry(client=client, prefix="nomad-watchdog").read()
    finally:
        await client.close()
    return {str(slug): record for slug, record in snapshot.records.items()}


async def get(session: aiohttp.ClientSession, url: str) -> Any:
    async with session.get(url) as answer:
        answer.raise_for_status()
        return json.loads(await answer.text())


async def audit(
    root: Path, consul: str, nomad: str, present: Collection[str], known: Collection[str]
) -> list[str]:
    """What does not hold of the promises that can be seen from outside when all is still.

    `present`: ids that are wanted; `known`: all that were ever registered."""
    wrong: list[str] = []
    stored = await records(consul)
    running = processes(root)
    async with aiohttp.ClientSession() as session:
        allocations = await get(session, f"{nomad}/v1/allocations?task_states=false")
        services = await get(session, f"{consul}/v1/health/service/device-watchdog-agent")
    live = {one["ID"]: one for one in allocations if one["ClientStatus"] in LIVE}
    wanted = {str(slug_of(DeviceId(name))): name for name in present}

    def expect(holds: bool, promise: str, what: str) -> None:
        if not holds:
            wrong.append(f"{promise}: {what}")

    for name in known:
        record = stored.get(str(slug_of(DeviceId(name))))
        expect(record is not None, "S4", f"{name} was acknowledged and is not in the registry")
        if record is not None:
            should = Presence.PRESENT if name in present else Presence.ABSENT
            expect(record.presence is should, "S4", f"{name} is {record.presence.value}")
    expect(len(stored) == len(set(known)), "S11", f"{len(stored)} records, {len(known)} devices")

    by_slug = Counter(one.slug for one in running)
    for slug, name in wanted.items():
        expect(by_slug[slug] == 1, "L1", f"{name} has {by_slug[slug]} agents")
    for slug in by_slug.keys() - wanted.keys():
        wrong.append(f"L1: {slug} is not wanted and has {by_slug[slug]} agents")
    for one in running:
        record = stored.get(one.slug)
        if record is None or one.slug not in wanted:
            continue
        expect(one.epoch == record.epoch, "S1", f"{one.slug}: epoch {one.epoch}, {record.epoch}")
        expect(one.instance == record.instance, "S1", f"{one.slug}: {one.instance} is not bound")
        expect(one.instance in live, "S3", f"{one.slug}: no live allocation for pid {one.pid}")
    expect(
        live.keys() == {one.instance for one in running},
        "S3",
        f"{len(live)} live allocations, {len(running)} processes",
    )

    in_consul = Counter(entry["Service"]["ID"] for entry in services)
    for slug, name in wanted.items():
        expect(in_consul[slug] == 1, "L1", f"{name} is {in_consul[slug]} times in Consul")
    for entry in services:
        service = entry["Service"]
        record = stored.get(service["ID"])
        expect(service["ID"] in wanted, "L1", f"{service['ID']} is still in Consul")
        if record is not None:
            told = (service["Meta"]["epoch"], service["Meta"]["instance"])
            expect(told == (str(record.epoch), record.instance), "S1", f"{service['ID']}: {told}")
        failing = [c["CheckID"] for c in entry["Checks"] if c["Status"] != "passing"]
        expect(not failing, "L1", f"{service['ID']}: {failing}")
    return wrong

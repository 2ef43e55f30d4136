"""Checks registry, Nomad, Consul and processes, and reports which promise does not hold.

Everything is read from the stores themselves, nothing from the control plane's own reports.
"""

from __future__ import annotations

import base64
import contextlib
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from nomad_watchdog.clients.nomad_features import Feature, of_members
from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.model import DeviceRecord, Presence
from nomad_watchdog.registry.codec import PoisonError, decode
from nomad_watchdog.schedulers.nomad._view import age
from servers.kubelet.spec import MARK

LIVE = {"running", "pending"}


@dataclass(frozen=True, slots=True)
class AgentProcess:
    """One agent process, as shown in /proc."""

    pid: int
    slug: str
    instance: str
    epoch: int
    job: str


@dataclass(frozen=True, slots=True)
class Where:
    """One installation, and the stores that it shares with others."""

    root: Path
    """Nomad's data folder: the agents' folders are below it."""
    consul: str
    nomad: str
    job_prefix: str = "device-watchdog"
    kv_prefix: str = "nomad-watchdog"
    service: str = "device-watchdog-agent"


@dataclass(slots=True)
class Findings:
    """Which promises were checked, and what does not hold."""

    asked: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def expect(self, holds: bool, promise: str, what: str) -> None:
        self.asked[promise] += 1
        if not holds:
            self.wrong.append(f"{promise}: {what}")


def processes(root: Path) -> list[AgentProcess]:
    """The running agents with a task folder below root."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError, KeyError):
            environment = (entry / "environ").read_bytes()
            if b"WATCHDOG_CONFIG" not in environment:  # skips most others at a fifth of the cost
                continue
            words = environment.decode(errors="replace").split("\0")
            values = dict(word.split("=", 1) for word in words if "=" in word)
            arguments = (entry / "cmdline").read_bytes()
            if values.get(MARK, "").startswith(f"{root}/"):
                told = json.loads(base64.b64decode(values["WATCHDOG_CONFIG_B64"]))
                pod = (told["slug"], values["POD_UID"], int(told["epoch"]), "device-watchdog/pod")
                found.append(AgentProcess(int(entry.name), *pod))
                continue
            if values["NOMAD_TASK_DIR"].startswith(f"{root}/") and b"watchdog-agent" in arguments:
                found.append(
                    AgentProcess(
                        int(entry.name),
                        values["NOMAD_META_slug"],
                        values["NOMAD_ALLOC_ID"],
                        int(values["NOMAD_META_epoch"]),
                        values["NOMAD_JOB_ID"],
                    )
                )
    return found


def is_of(job_id: str, prefix: str) -> bool:
    """Whether a job belongs to this installation: a dispatched child of a parent, or a device's own
    job (`register`)."""
    return job_id.startswith((f"{prefix}/", f"{prefix}-", f"{prefix}_next/"))


def doubled(root: Path, job_prefix: str = "") -> list[AgentProcess]:
    """Agents of devices that have more than one process at the same time (S3)."""
    first = [one for one in processes(root) if not job_prefix or is_of(one.job, job_prefix)]
    counts = Counter(one.slug for one in first)
    suspects = [one for one in first if counts[one.slug] > 1]
    if not suspects:
        return []
    # /proc is not read atomically: a process that has ended meanwhile may never have run beside the
    # other.
    alive = {one.pid for one in processes(root)}
    still = [one for one in suspects if one.pid in alive]
    counts = Counter(one.slug for one in still)
    return [one for one in still if counts[one.slug] > 1]


async def get(session: aiohttp.ClientSession, url: str) -> Any:
    async with session.get(url) as answer:
        answer.raise_for_status()
        return json.loads(await answer.text())


async def records(session: aiohttp.ClientSession, where: Where) -> dict[str, DeviceRecord]:
    """The registry's records by slug, read from Consul; invalid ones are left out."""
    found: dict[str, DeviceRecord] = {}
    folder = f"{where.kv_prefix}/devices/"
    for row in await get(session, f"{where.consul}/v1/kv/{folder}?recurse&consistent"):
        if row["Key"] == f"{folder}meta":
            continue
        slug = row["Key"].rpartition("/")[2]
        with contextlib.suppress(PoisonError):
            body = base64.b64decode(row["Value"] or "")
            found[slug] = decode(body, slug=slug, index=row["ModifyIndex"])
    return found


async def agents_jobs(session: aiohttp.ClientSession, where: Where) -> list[Any]:
    """The agents' jobs, including stopped ones, without the parents that children are dispatched
    from."""
    found = await get(session, f"{where.nomad}/v1/jobs?prefix={where.job_prefix}&meta=true")
    return [
        job for job in found if is_of(job["ID"], where.job_prefix) and "slug" in (job["Meta"] or {})
    ]


async def audit(
    root: Path, consul: str, nomad: str, present: Collection[str], known: Collection[str]
) -> list[str]:
    """The promises that do not hold, among those visible from outside once nothing changes any
    more.

    `present`: ids that should have an agent; `known`: all that were ever registered."""
    async with aiohttp.ClientSession() as session:
        where = Where(root, consul, nomad)
        return (await examine(session, where, present, known)).wrong


async def examine(
    session: aiohttp.ClientSession,
    where: Where,
    present: Collection[str],
    known: Collection[str],
) -> Findings:
    """Like `audit`, for one installation among others."""
    findings = Findings()
    stored = await records(session, where)
    running = [one for one in processes(where.root) if is_of(one.job, where.job_prefix)]
    mine = f'JobID matches "^{where.job_prefix}(_next)?[/-]"'
    async with session.get(
        f"{where.nomad}/v1/allocations", params={"task_states": "false", "filter": mine}
    ) as answer:
        answer.raise_for_status()
        allocations = await answer.json()
    jobs = await agents_jobs(session, where)
    services = await get(session, f"{where.consul}/v1/health/service/{where.service}")
    live = {one["ID"]: one for one in allocations if one["ClientStatus"] in LIVE}
    wanted = {str(slug_of(DeviceId(name))): name for name in present}
    _registry(findings, stored, present, known)
    _jobs(findings, stored, jobs, protected=await protected(session, where))
    _processes(findings, stored, running, live, wanted)
    _services(findings, stored, services, wanted)
    return findings


async def audit_pods(
    root: Path, consul: str, objects: Collection[Any], pods: Collection[Any],
    present: Collection[str], known: Collection[str],
) -> list[str]:  # fmt: skip
    """Like `audit`, on Kubernetes, from the lists of its API server."""
    findings = Findings()
    async with aiohttp.ClientSession() as session:
        where = Where(root, consul, "")
        stored = await records(session, where)
        services = await get(session, f"{consul}/v1/health/service/{where.service}")
    wanted = {str(slug_of(DeviceId(name))): name for name in present}
    live = {
        one["metadata"]["uid"]: one
        for one in pods
        if one["status"].get("phase") in {"Running", "Pending"}
    }
    told = [
        (
            one["metadata"]["labels"]["nomad-watchdog/slug"],
            one["metadata"]["labels"]["nomad-watchdog/epoch"],
        )
        for one in objects
    ]
    should = [(slug, str(stored[slug].epoch)) for slug in wanted if slug in stored]
    findings.expect(
        sorted(told) == sorted(should), "L1", f"{len(told)} objects, {len(should)} wanted"
    )
    _registry(findings, stored, present, known)
    _processes(findings, stored, processes(root), live, wanted)
    _services(findings, stored, services, wanted)
    return findings.wrong


async def audit_both(
    where: Where, objects: Collection[Any], pods: Collection[Any],
    present: Collection[str], known: Collection[str],
) -> list[str]:  # fmt: skip
    """Like `audit`, for a fleet whose agents run on Nomad and on Kubernetes."""
    findings = Findings()
    async with aiohttp.ClientSession() as session:
        stored = await records(session, where)
        allocations = await get(session, f"{where.nomad}/v1/allocations?task_states=false")
        jobs = await get(session, f"{where.nomad}/v1/jobs?prefix={where.job_prefix}/&meta=true")
        services = await get(session, f"{where.consul}/v1/health/service/{where.service}")
        safe = await protected(session, where)
    wanted = {str(slug_of(DeviceId(name))): name for name in present}
    live = {one["ID"]: one for one in allocations if one["ClientStatus"] in LIVE}
    live |= {
        one["metadata"]["uid"]: one
        for one in pods
        if one["status"].get("phase") in {"Running", "Pending"}
    }
    told = [one["metadata"]["labels"] for one in objects]
    there = {(one["nomad-watchdog/slug"], one["nomad-watchdog/epoch"]) for one in told}
    for slug, epoch in sorted({(j["Meta"]["slug"], j["Meta"]["epoch"]) for j in jobs} & there):
        findings.expect(False, "S2", f"{slug} was started on both at epoch {epoch}")
    running = processes(where.root)
    for one in running:
        home = "kubernetes" if one.job == "device-watchdog/pod" else "nomad"
        record = stored.get(one.slug)
        lives = (record.home or "nomad") if record is not None else ""
        findings.expect(lives == home, "L1", f"{one.slug} runs on {home}, its home is {lives}")
    _registry(findings, stored, present, known)
    _jobs(findings, stored, jobs, protected=safe)
    _processes(findings, stored, running, live, wanted)
    _services(findings, stored, services, wanted)
    return findings.wrong


def _registry(
    findings: Findings,
    stored: Mapping[str, DeviceRecord],
    present: Collection[str],
    known: Collection[str],
) -> None:
    for name in known:
        record = stored.get(str(slug_of(DeviceId(name))))
        findings.expect(
            record is not None, "S4", f"{name} was acknowledged and is not in the registry"
        )
        if record is not None:
            should = Presence.PRESENT if name in present else Presence.ABSENT
            findings.expect(record.presence is should, "S4", f"{name} is {record.presence.value}")
    findings.expect(
        len(stored) == len(set(known)), "S11", f"{len(stored)} records, {len(known)} devices"
    )


async def protected(session: aiohttp.ClientSession, where: Where) -> bool:
    """Whether this Nomad's idempotency tokens are safe against races."""
    features = of_members(await get(session, f"{where.nomad}/v1/agent/members"))
    return features is not None and features.has(Feature.RACE_SAFE_TOKENS)


def _jobs(
    findings: Findings,
    stored: Mapping[str, DeviceRecord],
    jobs: list[Any],
    *,
    protected: bool,
) -> None:
    """Every start so far (unless collected) had its epoch committed before, once.

    Where Nomad does not protect against races, one start can create several jobs: then all but the
    oldest are stopped, whichever racer found them."""
    starts: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for job in jobs:
        starts[job["Meta"]["slug"], job["Meta"]["epoch"]].append(job)
    for (slug, epoch), some in starts.items():
        _, *surplus = sorted(some, key=age)
        if protected:
            findings.expect(not surplus, "S2", f"{slug} was started {len(some)} times at {epoch}")
        left = [job["ID"] for job in surplus if not job["Stop"]]
        findings.expect(not left, "S2", f"{slug} has {left} beside the oldest job of {epoch}")
        record = stored.get(slug)
        if record is not None:
            committed = int(epoch) <= record.epoch
            findings.expect(committed, "S2", f"{slug} runs ahead at {epoch}, {record.epoch}")
    for job in jobs:
        _, _, name = job["ID"].partition("/dispatch-")
        slug = job["Meta"]["slug"]
        owned = name.startswith(f"{slug}-") or job["ID"].endswith(f"-{slug}")
        findings.expect(owned, "S11", f"{job['ID']!r} is not {slug}'s")


def _processes(
    findings: Findings,
    stored: Mapping[str, DeviceRecord],
    running: list[AgentProcess],
    live: Mapping[str, Any],
    wanted: Mapping[str, str],
) -> None:
    by_slug = Counter(one.slug for one in running)
    for slug, name in wanted.items():
        findings.expect(by_slug[slug] == 1, "L1", f"{name} has {by_slug[slug]} agents")
    for slug in by_slug.keys() - wanted.keys():
        findings.expect(False, "L1", f"{slug} is not wanted and has {by_slug[slug]} agents")
    for one in running:
        record = stored.get(one.slug)
        if record is None or one.slug not in wanted:
            continue
        findings.expect(
            one.epoch == record.epoch, "S1", f"{one.slug}: epoch {one.epoch}, {record.epoch}"
        )
        findings.expect(
            one.instance == record.instance, "S1", f"{one.slug}: {one.instance} is not bound"
        )
        findings.expect(
            one.instance in live, "S3", f"{one.slug}: no live allocation for pid {one.pid}"
        )
    findings.expect(
        live.keys() == {one.instance for one in running},
        "S3",
        f"{len(live)} live allocations, {len(running)} processes",
    )


def _services(
    findings: Findings,
    stored: Mapping[str, DeviceRecord],
    services: list[Any],
    wanted: Mapping[str, str],
) -> None:
    in_consul = Counter(entry["Service"]["ID"] for entry in services)
    for slug, name in wanted.items():
        findings.expect(in_consul[slug] == 1, "L1", f"{name} is {in_consul[slug]} times in Consul")
    for entry in services:
        service = entry["Service"]
        record = stored.get(service["ID"])
        failing = [c["CheckID"] for c in entry["Checks"] if c["Status"] != "passing"]
        if service["ID"] not in wanted:
            # a killed agent's entry is critical, and Consul removes it after 5 min
            findings.expect(bool(failing), "L1", f"{service['ID']} still passes in Consul")
            continue
        if record is not None:
            told = (service["Meta"]["epoch"], service["Meta"]["instance"])
            findings.expect(
                told == (str(record.epoch), record.instance), "S1", f"{service['ID']}: {told}"
            )
        findings.expect(not failing, "L1", f"{service['ID']}: {failing}")

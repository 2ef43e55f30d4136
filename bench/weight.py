"""Memory and CPU of an agent: compared with other programs on a node, among 50, forked, by feature, and under Nomad.

Agents are ready, run three probes and are registered in a real Consul. This process is the device and the
API. MB are 1,000,000 bytes; private is Private_Clean + Private_Dirty; PSS is the kernel's proportional share.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import trustme

from bench.agent import (
    SETTLE_S,
    Stub,
    _stop,
    _until_listening,
    bare_rss,
    bare_start_ms,
    megabytes,
    node_exporter,
    stub,
)
from bench.rows import Row
from nomad_watchdog.clients.nomad import NomadAccess, NomadClient
from nomad_watchdog.clients.nomad_rows import Job
from nomad_watchdog.demo.process import free_port
from nomad_watchdog.ids import parse_device_id, slug_of
from nomad_watchdog.model import AgentSpec, Epoch
from nomad_watchdog.schedulers.agent_zipapp import build_agent
from nomad_watchdog.schedulers.local import LocalScheduler
from nomad_watchdog.schedulers.nomad.jobs import dispatch_body, meta, payload
from nomad_watchdog.testing.conformance import record_of
from servers.consul import ConsulServer
from servers.nomad import NomadServer

AGENTS = 50
ON_NOMAD = 10
CPU_S = 40.0
PROBE_S = 10.0
BLACKBOX = "prometheus-blackbox-exporter"
JOB = Path(__file__).resolve().parent.parent / "jobs" / "device-watchdog.nomad.hcl"


def part(place: Stub, consul: str) -> dict[str, Any]:
    """A class's part of the document: three probes every 10 s."""
    port = place.server_address[1]
    each = {"interval_s": PROBE_S, "timeout_s": 2.0}
    return {
        "v": 1,
        "api": [f"http://127.0.0.1:{port}"],
        "consul": consul,
        "probes": [
            {"kind": "http", "port": port, **each},
            {"kind": "tcp", "port": port, **each},
            {"kind": "icmp", **each},
        ],
        "confirm": [{"kind": "tcp", "port": port}],
    }


def features(place: Stub, secure: Stub, ca: str) -> dict[str, dict[str, Any]]:
    """Feature → the settings that enable it. A disabled feature is not imported and has no row."""
    port = place.server_address[1]
    five = [{"kind": "http", "port": port, "interval_s": PROBE_S}] * 5
    url = f"http://127.0.0.1:{port}/"

    def probing(**probe: Any) -> dict[str, Any]:
        return {"probes": part(place, "")["probes"] + [{**probe, "interval_s": PROBE_S}]}

    return {
        "5 more probes": {"probes": part(place, "")["probes"] + five},
        "a dns probe": probing(kind="dns", name="example.org"),
        "a command probe": probing(kind="command", command=["/bin/true"]),
        "a file probe": probing(kind="file", file="/proc/self/status", forbid_text="panic"),
        "an mqtt probe": probing(kind="mqtt", port=port),
        "an snmp probe": probing(kind="snmp"),
        "an https probe": probing(kind="https", port=secure.server_address[1], verify=False),
        "an mqtt probe over TLS": probing(
            kind="mqtt", tls=True, port=secure.server_address[1], verify=False
        ),
        "state in Consul": {"state": "consul"},
        "a gateway": {"gateway": {"address": "127.0.0.1", "kind": "tcp", "port": port}},
        "a ladder of two repairs": {
            "repairs": [{"kind": "http", "url": url}, {"kind": "wake", "mac": "02:00:00:00:00:01"}]
        },
        "escalation to a webhook": {"escalate": {"sinks": [{"kind": "webhook", "url": url}]}},
        "logs to Loki": {"loki": {"url": url.rstrip("/")}},
        "https to the API": {
            "api": [f"https://127.0.0.1:{secure.server_address[1]}"],
            "ca_cert": ca,
        },
    }


@contextlib.contextmanager
def agents(argv: list[str], folder: Path, configs: dict[str, Any]) -> Iterator[list[int]]:
    """Start agents (name → document) and yield their PIDs."""
    running: list[subprocess.Popen[bytes]] = []
    try:
        for name, config in configs.items():
            slug = slug_of(parse_device_id(name))
            device = {"device_id": name, "slug": slug, "epoch": 1, "address": "127.0.0.1"}
            file = folder / f"{name}.json"
            file.write_text(json.dumps({**config, **device}))
            env = {"WATCHDOG_INSTANCE": name, "WATCHDOG_CONFIG": str(file)}
            running.append(
                subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env={"PATH": os.environ.get("PATH", os.defpath), **env},
                )
            )
        yield [one.pid for one in running]
    finally:
        _stop(running)


def rss(pid: int) -> float:
    return megabytes(pid, "status", "VmRSS")


def private(pid: int) -> float:
    return megabytes(pid, "smaps_rollup", "Private_Clean", "Private_Dirty")


def pss(pid: int) -> float:
    return megabytes(pid, "smaps_rollup", "Pss")


def cpu_ns(pid: int) -> int:
    """CPU time so far in nanoseconds, from the kernel's scheduler."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])


def cpu_share(pids: list[int], seconds: float) -> float:
    """Average CPU use of one of these processes over `seconds`, in percent of a core."""
    before, began = sum(map(cpu_ns, pids)), time.perf_counter()
    time.sleep(seconds)  # the measurement takes this long
    took = (time.perf_counter() - began) * 1e9
    return 100 * (sum(map(cpu_ns, pids)) - before) / took / len(pids)


def one(
    argv: list[str], folder: Path, place: Stub, config: dict[str, Any], name: str
) -> tuple[float, float]:
    """(ms from start to the first ready report, MB resident after SETTLE_S)."""
    began = time.perf_counter()
    with agents(argv, folder, {name: config}) as (pid,):
        place.wait_for({name}, 60.0)
        took = (place.ready_at[name] - began) * 1e3
        time.sleep(SETTLE_S)  # lets it settle; there is no event to wait for
        return took, rss(pid)


def medians(runs: list[tuple[float, float]]) -> tuple[float, float]:
    return statistics.median(r[0] for r in runs), statistics.median(r[1] for r in runs)


@contextlib.contextmanager
def secure_stub() -> Iterator[tuple[Stub, str]]:
    """An API with TLS, and its CA as PEM."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with stub() as place:
        place.socket = context.wrap_socket(place.socket, server_side=True)
        yield place, authority.cert_pem.bytes().decode()


def singles(argv: list[str], folder: Path, place: Stub, consul: str, runs: int) -> list[Row]:
    plain = part(place, consul)
    found = medians([one(argv, folder, place, plain, f"one-{n}") for n in range(runs)])
    without = medians([one(argv, folder, place, part(place, ""), f"bare-{n}") for n in range(runs)])
    bare_ms = statistics.median(bare_start_ms() for _ in range(runs))
    bare_mb = statistics.median(bare_rss() for _ in range(runs))
    rows = [
        Row("bare CPython RSS", bare_mb, "MB", note="python -I -S, idle"),
        Row(
            "agent RSS, 3 probes, in real Consul",
            found[1],
            "MB",
            floor="≤ 16",
            aim="≤ 12",
            note=f"{found[1] / bare_mb:.2f} × bare",
        ),
        Row(
            "agent start → ready, above bare CPython",
            found[0] - bare_ms,
            "ms",
            floor="≤ 150",
            aim="≤ 40",
            note=f"{found[0]:.1f} ms in all: registered in real Consul, probed, first report there",
        ),
        Row("weight of Consul registration", found[1] - without[1], "MB", note="RSS, on − off"),
    ]
    with secure_stub() as (secure, ca):
        for name, changes in features(place, secure, ca).items():
            api = secure if "ca_cert" in changes else place
            label = name.replace(" ", "-")
            config = plain | changes
            on = medians([one(argv, folder, api, config, f"{label}-{n}") for n in range(runs)])
            rows.append(Row(f"weight of {name}", on[1] - found[1], "MB", note="RSS, on − off"))
    return rows


def spawned(argv: list[str], folder: Path, place: Stub, consul: str, seconds: float) -> list[Row]:
    configs = {f"many-{n}": part(place, consul) for n in range(AGENTS)}
    with agents(argv, folder, configs) as pids:
        place.wait_for(set(configs), 120.0)
        time.sleep(SETTLE_S)  # as above
        share = cpu_share(pids, seconds)
        own, fair = statistics.median(map(private, pids)), statistics.median(map(pss, pids))
    return [
        Row(
            "agent CPU, 3 probes every 10 s",
            share,
            "% of a core",
            floor="≤ 0.3",
            aim="≤ 0.1",
            note=f"mean of {AGENTS} over {seconds:.0f} s, reports and Consul's checks included",
        ),
        Row(f"agent private memory, of {AGENTS} spawned", own, "MB"),
        Row(f"agent PSS, of {AGENTS} spawned", fair, "MB"),
    ]


async def forked(folder: Path, place: Stub, consul: str) -> list[Row]:
    """The same agents under the local backend."""
    config = part(place, consul)
    spec = AgentSpec(agent_class="default", version="1", spec_hash="w", agent_config=config)
    directory = folder / "agents"
    local = LocalScheduler(directory=directory)
    try:
        for number in range(AGENTS):
            await local.ensure(record_of(f"forked-{number}"), Epoch(1), spec)
        entries = [json.loads(f.read_text()) for f in directory.glob("*/placement.json")]
        told = {one["instance"] for one in entries}
        await asyncio.to_thread(place.wait_for, told, 120.0)
        await asyncio.sleep(PROBE_S + SETTLE_S)  # a second round of each probe
        pids = [one["pid"] for one in entries]
        own, fair = statistics.median(map(private, pids)), statistics.median(map(pss, pids))
        parent = pss(entries[0]["parent"])
        for (placement,) in (await local.snapshot()).placements.values():
            await local.retire(placement, 5.0)
        while any(p.state != "dead" for (p,) in (await local.snapshot()).placements.values()):
            await asyncio.sleep(0.1)
    finally:
        await local.close()
    return [
        Row(
            f"agent private memory, of {AGENTS} forked",
            own,
            "MB",
            floor="≤ 4",
            aim="≤ 1.2",
            note=f"local backend; the parent of all has {parent:.1f} MB PSS",
        ),
        Row(f"agent PSS, of {AGENTS} forked", fair, "MB"),
    ]


def below(pid: int) -> list[int]:
    """All descendants of this process."""
    parents: dict[int, list[int]] = {}
    for one_ in Path("/proc").iterdir():
        if one_.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (one_ / "stat").read_text().rpartition(")")[2].split()
                parents.setdefault(int(fields[1]), []).append(int(one_.name))
    found, todo = [], [pid]
    while todo:
        todo += (children := parents.get(todo.pop(), []))
        found += children
    return found


def unshaped(job: Job) -> Job:
    """The job with Nomad's defaults: 300 MB of disk, and collected logs."""
    for group in job["TaskGroups"] or []:
        group["EphemeralDisk"] = None
        for task in group["Tasks"] or []:
            task["LogConfig"] = None
    return job


async def on_nomad(agent: Path, place: Stub, *, shipped: bool) -> tuple[float, str]:
    """(PSS of an agent and of the processes that Nomad runs for it, in MB; description of these processes)."""
    async with nomad_of_its_own() as (server, client):
        variables = {"python": sys.executable, "agent_path": str(agent)}
        text = "".join(f"{k} = {json.dumps(v)}\n" for k, v in variables.items())
        job = await client.parse(JOB.read_text(), text)
        job = job if shipped else unshaped(job)
        await server.request("PUT", "/v1/jobs", {"Job": job})
        config = part(place, "")
        spec = AgentSpec(agent_class="default", version="1", spec_hash="w", agent_config=config)
        for number in range(ON_NOMAD):
            device = record_of(f"nomad-{'a' if shipped else 'b'}-{number}")
            body = dispatch_body(payload(device, Epoch(1), spec), meta(device, Epoch(1), spec, 0))
            await server.request("PUT", f"/v1/job/{job['ID']}/dispatch", body)
        allocations = await placed(server)
        await asyncio.to_thread(place.wait_for, allocations, 120.0)
        await asyncio.sleep(SETTLE_S)
        kinds: dict[str, list[float]] = {}
        for pid in below(server.pid()):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                kind = words[1].decode() if b"nomad" in words[0] else "agent"
                kinds.setdefault(kind, []).append(pss(pid))
    total = sum(map(sum, kinds.values())) / ON_NOMAD
    said = ", ".join(f"{len(v)} {k} {statistics.mean(v):.1f} MB" for k, v in sorted(kinds.items()))
    return total, said


@contextlib.asynccontextmanager
async def nomad_of_its_own() -> AsyncIterator[tuple[NomadServer, NomadClient]]:
    with tempfile.TemporaryDirectory(prefix="nomad-watchdog-bench-") as folder:
        async with NomadServer(Path(folder) / "nomad") as server:
            client = NomadClient(NomadAccess.from_env(address=server.http_addr))
            try:
                yield server, client
            finally:
                await client.close()


async def placed(server: NomadServer) -> set[str]:
    """Wait until all agents run, and return their allocations."""
    async with asyncio.timeout(120.0):
        while True:
            found: list[Any] = await server.request("GET", "/v1/allocations")
            running = {a["ID"] for a in found if a["ClientStatus"] == "running"}
            if len(running) == ON_NOMAD:
                return running
            await asyncio.sleep(0.2)


async def per_gib(agent: Path, place: Stub) -> list[Row]:
    ours, what = await on_nomad(agent, place, shipped=True)
    theirs, else_ = await on_nomad(agent, place, shipped=False)
    gib = 2**30 / 1e6
    return [
        Row("agents per GiB under Nomad, shipped job", gib / ours, "", note=f"PSS: {what}"),
        Row("agents per GiB under Nomad, its defaults", gib / theirs, "", note=f"PSS: {else_}"),
        Row(
            "agents per GiB, shipped ÷ defaults",
            theirs / ours,
            "×",
            floor="≥ 1.3",
            aim="≥ 1.8",
            note="raw_exec; each agent with its share of Nomad's own processes",
        ),
    ]


def blackbox(folder: Path, place: Stub) -> list[Row]:
    """Debian's blackbox exporter, installed or unpacked from its package, idle and after 5 probes."""
    name = f"{BLACKBOX} RSS"
    program = shutil.which(BLACKBOX) or unpacked(folder)
    if program is None:
        return [Row(name, float("nan"), "MB", note=f"not to be had: apt-get install {BLACKBOX}")]
    config = folder / "blackbox.yml"
    config.write_text("modules:\n  http_2xx:\n    prober: http\n")
    address = f"127.0.0.1:{free_port()}"
    argv = [program, f"--config.file={config}", f"--web.listen-address={address}"]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _until_listening(address, process)
        time.sleep(SETTLE_S)  # as above
        idle = rss(process.pid)
        target = f"http://127.0.0.1:{place.server_address[1]}"
        for _ in range(5):
            fetch(f"http://{address}/probe?module=http_2xx&target={target}")
        after = rss(process.pid)
    finally:
        _stop([process])
    return [Row(f"{name}, idle", idle, "MB"), Row(f"{name}, after 5 probes", after, "MB")]


def fetch(url: str) -> None:
    import urllib.request

    with urllib.request.urlopen(url, timeout=10) as answer:
        answer.read()


def quietly(argv: list[str], folder: Path) -> None:
    subprocess.run(argv, check=True, cwd=folder, capture_output=True, timeout=120)


def unpacked(folder: Path) -> str | None:
    """The program from Debian's package, without installing it; None = the package is not available."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        quietly(["apt-get", "download", BLACKBOX], folder)
        (package,) = folder.glob(f"{BLACKBOX}_*.deb")
        quietly(["dpkg-deb", "-x", str(package), str(folder / "blackbox")], folder)
        return str(folder / "blackbox" / "usr" / "bin" / BLACKBOX)
    return None


async def measure(*, quick: bool) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="nomad-watchdog-bench-") as name, stub() as place:
        folder = Path(name)
        agent = folder / "agent.pyz"
        build_agent(agent)
        argv = [sys.executable, "-I", "-S", str(agent)]
        async with ConsulServer(folder / "consul") as server:
            consul = server.http_addr
            rows = await asyncio.to_thread(singles, argv, folder, place, consul, 3 if quick else 7)
            seconds = 10.0 if quick else CPU_S
            rows += await asyncio.to_thread(spawned, argv, folder, place, consul, seconds)
            rows += await forked(folder, place, consul)
        rows += await per_gib(agent, place)
        rows += await asyncio.to_thread(node_exporter)
        return rows + await asyncio.to_thread(blackbox, folder, place)


def run(*, quick: bool = False) -> list[Row]:
    return asyncio.run(measure(quick=quick))


if __name__ == "__main__":
    from bench.rows import table

    print(table(run(quick="--quick" in sys.argv)))

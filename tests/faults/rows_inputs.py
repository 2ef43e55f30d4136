"""Rows 23 to 36: clocks, full disks, no descriptors, poison records, hostile IDs, floods, crash loops, secrets."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from urllib.parse import quote

import aiohttp

from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.registry.codec import decode
from tests.e2e import audit
from tests.faults.matrix import row
from tests.faults.rows_crash import watched
from tests.faults.site import BrokenRowError, limited_folder, until
from tests.faults.world import World

HOUR = 3600.0
Y2038 = 2**31


@row("23-wall", "our wall clock jumps by +1 h, -1 h, and past 2038", stake="S1 S6")
async def wall_jumps(world: World) -> None:
    await _jumps(world, (HOUR, 0.0), (-HOUR, 0.0), (Y2038 + 10.0 - time.time(), 0.0))


@row("23-suspend", "our monotonic clock jumps by an hour, as after a suspend", stake="S1 S6")
async def suspended(world: World) -> None:
    await _jumps(world, (0.0, HOUR), (0.0, 2 * HOUR))


async def _jumps(world: World, *jumps: tuple[float, float]) -> None:
    clocks = world.root / "clocks"
    clocks.write_text("0 0")
    await world.program.start(module="tests.faults.skewed", FAULTS_CLOCKS=str(clocks))
    names = world.names(4 + len(jumps))
    await world.wishes(*names)
    await world.settle()
    before = world.pids()
    for number, (wall, monotonic) in enumerate(jumps):
        fresh = clocks.with_suffix(".new")
        fresh.write_text(f"{wall} {monotonic}")
        fresh.replace(clocks)
        await asyncio.sleep(4.0)
        world.undisturbed(before)
        await world.wish(names[number], present=False)
        await world.wish(f"{world.name} late {number}")
        await world.settle()
        before = world.pids()


@row(
    "24-registry",
    "the disk of the SQLite registry is full",
    stake="S4",
    registry="sqlite",
)
async def full_registry(world: World) -> None:
    with limited_folder(world.root / "small", "400k") as folder:
        text = world.program.config.read_text()
        world.program.config.write_text(
            text.replace('kind = "sqlite"', f'kind = "sqlite"\n  path = "{folder}/registry.db"')
        )
        await world.program.start()
        await world.wishes(*world.names(3))
        await world.settle()
        before = world.pids()
        (folder / "ballast").write_bytes(b"x" * _free(folder))
        refused = 0
        stored: list[str] = []
        for number in range(60):
            name = f"{world.name} more {number:02}"
            body = {"address": "127.0.0.1", "labels": {f"l{n}": "x" * 100 for n in range(30)}}
            status, _ = await world.call("PUT", f"/v1/devices/{quote(name, safe='')}", body)
            if status < 300:
                world.wanted[name] = True
                stored.append(name)
            elif status == 503:
                refused += 1
            else:
                world.broken.append(f"S4: a full disk is answered with {status}")
        if not refused:
            raise BrokenRowError("the disk never was full")
        world.notes.append(f"{refused} wishes were refused with 503, {len(stored)} were stored")
        world.undisturbed(before)
        (folder / "ballast").unlink()
        await world.wish(f"{world.name} after")
        world.program.kill_now()
        await world.program.start()
        _, page = await world.call("GET", "/v1/devices?limit=1000")
        known = {item["id"] for item in page["items"]}
        for name in world.wanted:
            if name not in known:
                world.broken.append(f"S4: {name} was acknowledged and is gone")
        await world.settle()
        await world.finish()
        await world.program.stop()


def _free(folder: Path) -> int:
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


@row("25-descriptors", "the program runs out of file descriptors for 10 s", stake="S9 L4")
async def no_descriptors(world: World) -> None:
    names = await watched(world, 4)
    before = world.pids()
    pid = world.program.running.pid
    used = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    _limit(pid, used + 4)
    host, _, port = world.program.listen.rpartition(":")
    async with AsyncExitStack() as stack:
        for _ in range(64):
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(1.0):
                    _, writer = await asyncio.open_connection(host, int(port))
                stack.callback(writer.close)
        size = world.program.log.stat().st_size
        await asyncio.sleep(10.0)
        world.undisturbed(before)
        grown = world.program.log.stat().st_size - size
    if "system resource" not in world.program.log.read_text(errors="replace"):
        raise BrokenRowError("the program never ran out of descriptors")
    world.notes.append(f"the log grew by {grown / 10_000:.1f} kB a second meanwhile")
    if grown > 1_000_000:
        world.broken.append(f"S9: the log grew by {grown} bytes in 10 s")
    _limit(pid, 1024)
    await world.wishes(*world.names(2, "new"))
    await world.wish(names[0], present=False)
    await world.settle()


def _limit(pid: int, count: int) -> None:
    subprocess.run(["prlimit", f"--pid={pid}", f"--nofile={count}:"], check=True, timeout=10)


async def _put(world: World, slug: str, body: bytes) -> None:
    url = f"{world.where.consul}/v1/kv/{await _key(world, slug)}"
    async with world.session.put(url, data=body) as answer:
        answer.raise_for_status()


async def _key(world: World, slug: str) -> str:
    """Key of the record of a slug, or the key that it would have next to others."""
    rows = await audit.get(
        world.session, f"{world.where.consul}/v1/kv/{world.where.kv_prefix}/devices/?keys"
    )
    found = [key for key in rows if key.endswith(f"/{slug}")]
    return str(found[0]) if found else f"{world.where.kv_prefix}/devices/00/{slug}"


POISON = {
    "no JSON": b"{",
    "bytes": bytes(range(256)),
    "huge": b'{"v": 1, "id": "' + b"x" * 100_000 + b'"}',
    "of a later version": b'{"v": 2}',
    "deep": b"[" * 50_000,
    "empty": b"",
}


@row("26-strangers", "records that make no sense are written between ours", stake="S9")
async def poison_between(world: World) -> None:
    names = await watched(world, 3)
    before = world.pids()
    for number, body in enumerate(POISON.values()):
        await _put(world, f"poison-{number}", body)
    await world.wishes(*world.names(2, "new"))
    await world.wish(names[0], present=False)
    await world.settle()
    _, text = await world.call("GET", "/metrics")
    series = "nomad_watchdog_poisoned_records "
    count = float(next(x for x in text.splitlines() if x.startswith(series)).split()[-1])
    if count != len(POISON):
        world.broken.append(f"S9: {count} poisoned records are counted, not {len(POISON)}")
    world.undisturbed(before, "S9", leaving=1)


@row("26-ours", "the record of a watched device is overwritten with garbage", stake="S7 S9")
async def poison_ours(world: World) -> None:
    names = await watched(world, 4)
    before = world.pids()
    slug = slug_of(DeviceId(names[0]))
    key = await _key(world, slug)
    url = f"{world.where.consul}/v1/kv/{key}"
    async with world.session.get(f"{url}?raw") as answer:
        good = await answer.read()
    for body in POISON.values():
        await _put(world, slug, body)
        await asyncio.sleep(2.0)
    await asyncio.sleep(8.0)
    world.undisturbed(before)
    await world.wishes(*world.names(2, "new"))
    decode(good, slug=slug)
    await _put(world, slug, good)
    await world.settle()
    world.undisturbed(before)


HOSTILE = [
    "../../../etc/passwd",
    "a/b/c",
    "..",
    "${NOMAD_META_slug}",
    '{{ env "HOME" }}',
    "$(touch /tmp/pwned)",
    "`id`",
    "'; DROP TABLE devices; --",
    "<script>alert(1)</script>",
    "%2e%2e%2f%00",
    "CAM",
    "cam",
    "Cam",
    "кам 📷 カメラ",
    "e\u0301 and é",
    "-rf",
    "--help",
    "a" * 128,
    "x\\y",
    'quote " and # hash',
]
REFUSED = [
    "",
    " blank ",
    "line\nbreak",
    "\x1b[31mred",
    "nul\0",
    "a" * 129,
    "\u202eback",
    "x\u2028y",
]


@row("27-hostile", "ids that are paths, templates, commands, markup, twins", stake="S11 S10")
async def hostile(world: World) -> None:
    await world.program.start()
    wishes = [{"id": name, "class": "default", "address": "127.0.0.1"} for name in HOSTILE]
    status, said = await world.call("POST", "/v1/devices:bulk", {"devices": wishes})
    for result in said["results"]:
        if result["status"] >= 300:
            raise BrokenRowError(f"{result['id']!a} was refused: {result}")
        world.wanted[result["id"]] = True
    for name in REFUSED:
        body = {"devices": [{"id": name, "class": "default", "address": "127.0.0.1"}]}
        status, said = await world.call("POST", "/v1/devices:bulk", body)
        results = said.get("results", [{"status": status}]) if isinstance(said, dict) else []
        if not results or any(result["status"] < 400 for result in results):
            world.broken.append(f"S11: {name!a} was taken: {status}")
    await world.settle()
    if Path("/tmp/pwned").exists():
        world.broken.append("S11: a command in an id was carried out")
    _, page = await world.call("GET", "/")
    if "<script>alert" in str(page):
        world.broken.append("S11: markup in an id reached the page")
    _, listed = await world.call("GET", "/v1/devices?limit=1000")
    if {item["id"] for item in listed["items"]} != {*HOSTILE}:
        world.broken.append("S11: an id is not listed as it was given")
    for name in HOSTILE:
        status, shown = await world.call("GET", f"/v1/devices/{quote(name, safe='')}")
        # a client that follows RFC 3986 never sends the path `..`
        if name != ".." and (status != 200 or shown["id"] != name):
            world.broken.append(f"S11: {name!a} is answered with {status}")


@row("28-oversize", "bodies, labels and addresses far beyond every limit", stake="S9 S11")
async def oversize(world: World) -> None:
    await watched(world, 2)
    for body in (
        {"address": "127.0.0.1", "labels": {"x": "y" * 2_000_000}},
        {"address": "127.0.0.1", "labels": {f"label-{n}": "y" * 100 for n in range(500)}},
        {"address": "a" * 100_000},
        {"address": "127.0.0.1", "labels": {"k" * 5000: "v"}},
    ):
        status, said = await world.call("PUT", "/v1/devices/too-much", body)
        if status not in {400, 413, 422}:
            world.broken.append(f"S9: an oversize body is answered with {status}: {said}")
    headers = {"Authorization": f"Bearer {world.token}", "Content-Encoding": "gzip"}
    url = f"{world.program.api}/v1/devices/bomb"
    async with world.session.put(url, data=b"\x1f\x8b" + bytes(1000), headers=headers) as answer:
        if answer.status != 415:
            world.broken.append(f"S9: a compressed body is answered with {answer.status}")
    # as large as allowed: stored and dispatched, or refused; never half of it
    most = {f"label-{n:03}": "y" * 100 for n in range(100)}
    name = f"{world.name} large"
    body = {"address": "127.0.0.1", "labels": most}
    status, said = await world.call("PUT", f"/v1/devices/{quote(name)}", body)
    if status < 300:
        world.wanted[name] = True
    await world.settle()


@row("30-flood", "3,000 webhooks and 300 silent connections at once", stake="S5 S9 L4")
async def flood(world: World) -> None:
    names = await watched(world, 4)
    before = world.pids()
    host, _, port = world.program.listen.rpartition(":")
    limit = asyncio.Semaphore(100)
    connector = aiohttp.TCPConnector(limit=100)
    statuses: dict[int, int] = {}
    headers = {"Authorization": f"Bearer {world.token}"}
    waits: list[float] = []

    async def post(http: aiohttp.ClientSession, number: int) -> None:
        event = {"event": "connected", "device": {"id": names[number % 4],
                 "class": "default", "address": "127.0.0.1"}}  # fmt: skip
        async with (
            limit,
            http.post(f"{world.program.api}/v1/webhook", json=event, headers=headers) as answer,
        ):
            await answer.read()
            statuses[answer.status] = statuses.get(answer.status, 0) + 1

    async def good() -> None:
        for number in range(8):
            began = time.monotonic()
            await world.wish(f"{world.name} good {number}")
            waits.append(time.monotonic() - began)

    async with AsyncExitStack() as stack:
        for _ in range(300):
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"POST /v1/webhook HTTP/1.1\r\nHost: x\r\n")
            stack.callback(writer.close)
        http = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        async with asyncio.TaskGroup() as group:
            group.create_task(good())
            for number in range(3000):
                group.create_task(post(http, number))
    world.notes.append(
        f"answers by status {statuses}; a real wish in the flood took {max(waits):.2f} s at most"
    )
    if not set(statuses) <= {200, 201, 409, 429, 503}:
        world.broken.append(f"S9: the flood was answered with {statuses}")
    await world.settle()
    world.undisturbed(before, "S5")


@row("32-crash-loop", "the agents of one class die at once, for ever", stake="S9",
     bad_python="/bin/false")  # fmt: skip
async def crash_loop(world: World) -> None:
    await world.program.start()
    bad = world.names(2, "bad")
    await world.wishes(*bad, kind="bad")
    began = time.monotonic()
    await world.wishes(*world.names(4))
    good = set(world.names(4))

    async def up() -> bool:
        _, page = await world.call("GET", "/v1/devices?limit=1000&verdict=watched")
        return good <= {item["id"] for item in page["items"]}

    await until(up, 30.0, "the good devices are watched beside the bad ones")
    world.notes.append(f"others were watched after {time.monotonic() - began:.1f} s")
    await asyncio.sleep(30.0)
    for name in bad:
        slug = slug_of(DeviceId(name))
        jobs = [job for job in await world.jobs() if job["Meta"]["slug"] == slug]
        if len(jobs) > 8:
            world.broken.append(f"S9: {len(jobs)} starts of one poison device in half a minute")
        _, shown = await world.call("GET", f"/v1/devices/{quote(name)}")
        if shown["verdict"] not in {"failing", "starting", "unwatched"}:
            world.broken.append(f"S6: a crash loop is called {shown['verdict']}")
    await world.wishes(*bad, present=False)
    await world.settle()


@row("36-secrets", "wrong tokens, tokens in the query, errors of every kind, at log level debug",
     stake="S10")  # fmt: skip
async def secrets(world: World) -> None:
    names = await watched(world, 2)
    for path in (f"/v1/devices?token={world.token}", f"/v1/devices/{world.token}", "/nowhere"):
        await world.call("GET", path)
    await world.call("PUT", "/v1/devices/x", {"addresss": "127.0.0.1"})
    wrong = {"Authorization": f"Basic {world.token}"}
    async with world.session.get(f"{world.program.api}/v1/devices", headers=wrong) as answer:
        said = await answer.text()
    if answer.status != 401 or world.token in said:
        world.broken.append(f"S10: a wrong scheme is answered with {answer.status}: {said}")
    await world.wish(names[0], present=False)
    await world.settle()

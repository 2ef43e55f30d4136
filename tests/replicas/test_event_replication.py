"""Events of several replicas published once: real APIs on free ports, and leases that the test gives and takes."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

import aiohttp
import pytest
from aiohttp import web

from nomad_watchdog.api import Runner, make_app
from nomad_watchdog.api.auth import authenticator_of
from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.clock import SystemClock
from nomad_watchdog.config.api import ApiSettings
from nomad_watchdog.core.incidents import GroupKind
from nomad_watchdog.events._sql import TAIL
from nomad_watchdog.events.log import Event, EventLog
from nomad_watchdog.events.merged_log import MergedLog
from nomad_watchdog.events.store import EventStore
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import DeviceId, Shard, Slug, slug_of
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import Limits, Monotonic
from nomad_watchdog.registry import CommitGuard
from nomad_watchdog.registry.sqlite import SqliteRegistry
from nomad_watchdog.replicas import event_replication
from nomad_watchdog.replicas.event_replication import MAX_BATCH, EventReplicator
from nomad_watchdog.replicas.leases import Lease, Replica, Term
from nomad_watchdog.replicas.report_replication import ReportReplicator


@dataclass
class Board:
    """The holder of shard 0, and the living replicas."""

    holder: str = ""
    term: int = 0
    there: dict[str, str] = field(default_factory=dict)

    def give(self, name: str) -> None:
        self.holder, self.term = name, self.term + 1


@dataclass
class Leases:
    """One replica's view of the board. `blind`: it can neither read it nor hold anything."""

    board: Board
    replica: str
    shards: int = 1
    problem: str = ""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    blind: bool = False

    def terms(self) -> Mapping[Shard, Term]:
        ours = self.board.holder == self.replica and not self.blind
        return {Shard(0): Term(self.board.term, Monotonic(0.0))} if ours else {}

    def guards(self, slugs: Collection[Slug]) -> Sequence[CommitGuard]:
        return ()

    def all(self) -> Sequence[Lease]:
        return [Lease(Shard(0), self.board.holder)]

    def replicas(self) -> Sequence[Replica]:
        return [Replica(name, api, 0.0, 1, "1") for name, api in self.board.there.items()]

    def configs(self) -> Sequence[str] | None:
        return ()

    async def announce(self, config: str) -> None:
        return

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def release(self) -> None:
        return


@dataclass
class Plane:
    """One replica: its own events, its part of the feed and its API."""

    name: str
    fleet: Fleet
    told: MergedLog
    leases: Leases
    feed: EventReplicator
    api: str
    task: asyncio.Task[None]
    end: Callable[[], Awaitable[None]]

    def see(self, device: str, what: str, /, **data: object) -> Event:
        slug = slug_of(DeviceId(device)) if device else Slug("")
        return self.fleet.events.own.add(
            at=self.fleet.clock.wall(), kind=what, device_id=device, slug=slug, text="", data=data
        )

    def log(self) -> list[tuple[str, str]]:
        return [(event.device_id, event.kind) for event in self.told.log.recent()]

    def ids(self) -> list[str]:
        return [event.id for event in self.told.log.recent()]

    @property
    def tells(self) -> bool:
        return self.fleet.views.status()["event_feed"] == {"teller": self.name, "problem": ""}

    async def read(self, query: str) -> list[dict[str, object]]:
        async with aiohttp.ClientSession() as client:  # noqa: SIM117
            async with client.get(f"{self.api}/v1/events?limit=1000&{query}") as answer:
                assert answer.status == 200, await answer.text()
                items: list[dict[str, object]] = (await answer.json())["items"]
                return items


@asynccontextmanager
async def plane(folder: Path, board: Board, name: str, token: str = "") -> AsyncIterator[Plane]:
    root = folder / name
    root.mkdir(exist_ok=True)
    registry = SqliteRegistry(path=root / "registry.db")
    await registry.initialise()
    store = EventStore(root / "told.db", origin=name)
    found = await store.open()
    told = MergedLog(EventLog(name, store, is_copied=True))
    told.resume(found.events, found.verdicts, found.origins)
    fleet = Fleet(registry, Limits(), SystemClock(), EventLog(name))
    fleet.records.reset({}, 0)
    leases = Leases(board, name)
    authenticator = None
    if token:
        (root / "token").write_text("operator-token-of-all")
        authenticator = authenticator_of(ApiSettings(token_file=str(root / "token")))
    feed = EventReplicator(fleet, told, leases, lambda: token)
    app = make_app(
        fleet, metrics=Metrics(), artifact=None, leases=leases, authenticator=authenticator
    )
    app[CONTEXT].feed = feed
    runner = Runner(app, shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    api = board.there[name] = f"http://{host}:{port}"
    task = asyncio.create_task(feed.run())

    async def end() -> None:
        board.there.pop(name, None)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await runner.cleanup()
        await store.close()
        await registry.close()

    one = Plane(name, fleet, told, leases, feed, api, task, end)
    try:
        yield one
    finally:
        await end()


async def until(what: Callable[[], object], timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not what():
            await asyncio.sleep(0.02)


@asynccontextmanager
async def planes(folder: Path, board: Board, *names: str) -> AsyncIterator[list[Plane]]:
    """These replicas; the first one publishes."""
    async with AsyncExitStack() as stack:
        found = [await stack.enter_async_context(plane(folder, board, name)) for name in names]
        board.give(names[0])
        await until(lambda: found[0].tells)
        await until(lambda: not any(one.feed.problem for one in found))
        yield found


async def test_what_all_see_is_told_once_and_by_one(tmp_path: Path) -> None:
    """A change that three replicas saw is one event, with one ID and one number, on each; the replica's own log has its
    own view."""
    async with planes(tmp_path, Board(), "a", "b", "c") as (a, b, c):
        for one in (c, a, b):
            one.see("pump", "verdict.offline")
            one.see("pump", "present", generation=2)
        for one in (a, b, c):
            await until(lambda one=one: len(one.log()) == 2)
            items = await one.read("since=0")
            assert [(item["id"], item["kind"]) for item in items] == [
                ("a:1", "verdict.offline"),
                ("a:2", "present"),
            ]
            (mine, _) = await one.read("own=true")
            assert mine["id"] == f"{one.name}:1"
        assert len({tuple(event.seq for event in one.told.log.recent()) for one in (a, b, c)}) == 1


async def test_what_one_alone_knows_is_told_for_it(tmp_path: Path) -> None:
    """An audit event of a replica that does not publish appears on all replicas, once, although it is sent to the
    publisher again until it comes back."""
    async with planes(tmp_path, Board(), "a", "b", "c") as (a, b, c):
        for number in range(30):
            b.see("pump", "audit.register", number=number)
            await asyncio.sleep(0.01)
        for one in (a, b, c):
            await until(lambda one=one: len(one.log()) == 30)
        assert c.ids() == [f"b:{n}" for n in range(1, 31)]
        await asyncio.sleep(1.2)  # it is sent again meanwhile
        assert len(a.log()) == 30


async def test_a_hand_over_tells_nothing_twice_and_leaves_nothing_out(tmp_path: Path) -> None:
    """Devices change all the time, every replica sees each change, and the publisher changes: each change is published
    once, in order per device, and all logs are the same."""
    board = Board()
    async with planes(tmp_path, board, "a", "b", "c") as all_of_them:
        states = ("suspect", "offline", "watched")
        for number in range(60):
            for one in sorted(all_of_them, key=lambda p: (number * 7 + ord(p.name)) % 5):
                one.see(f"d{number % 4}", f"verdict.{states[number // 4 % 3]}")
            if number % 15 == 14:
                board.give("abc"[number // 15 % 3])
            await asyncio.sleep(0.03)
        for one in all_of_them:
            await until(lambda one=one: len(one.log()) == 60)
            for device in range(4):
                told = [kind for name, kind in one.log() if name == f"d{device}"]
                assert told == [f"verdict.{states[n % 3]}" for n in range(15)]
        first, *others = (one.ids() for one in all_of_them)
        assert all(ids == first for ids in others)
        assert len(set(first)) == 60


async def test_what_happened_while_nobody_told_is_told_by_the_heir(tmp_path: Path) -> None:
    """The publisher dies. What the others see before one of them takes over is published then, each change once. What
    the dead replica had published is not published again, and its open incident is closed."""
    board = Board()
    async with planes(tmp_path, board, "a", "b", "c") as (a, b, c):
        for one in (a, b, c):
            one.see("pump", "verdict.suspect")
        a.see("", "incident.opened", kind="host", group="h 1", members=[])
        await until(lambda: len(b.log()) == len(c.log()) == 2)
        await a.end()
        board.holder = ""
        for one in (b, c):
            one.see("pump", "verdict.offline")
            one.see("", "audit.pause", by=one.name)
        await asyncio.sleep(0.3)  # time in which a replica without the right could publish it
        board.give("b")
        await until(lambda: len(c.log()) == 6)
        assert Counter(b.log()) == Counter(
            {
                ("pump", "verdict.suspect"): 1,
                ("", "incident.opened"): 1,
                ("pump", "verdict.offline"): 1,
                ("", "audit.pause"): 2,
                ("", "incident.closed"): 1,
            }
        )
        assert b.ids() == c.ids()


async def test_the_last_teller_goes_on_while_consul_is_away(tmp_path: Path) -> None:
    """When the publisher can't read leases any more it continues, and the others still read its events."""
    board = Board()
    async with planes(tmp_path, board, "a", "b") as (a, b):
        a.leases.blind = True
        await asyncio.sleep(0.3)  # longer than its view of the leases lasts
        a.see("pump", "verdict.offline")
        await until(lambda: b.log() == [("pump", "verdict.offline")])


async def test_a_teller_that_was_cut_off_forgets_what_nobody_copied(tmp_path: Path) -> None:
    """It continued to publish after another replica had taken over. When it is back, its log is the same as the
    others'. What only it had seen meanwhile is published by its successor."""
    board = Board()
    async with planes(tmp_path, board, "a", "b", "c") as (a, b, c):
        for one in (a, b, c):
            one.see("pump", "verdict.suspect")
        await until(lambda: len(b.log()) == len(c.log()) == 1)
        # The connection between it and the others is cut.
        board.there.pop("a")
        for one in (b, c):
            one.feed._unfollow()
        for one in (a, b, c):
            one.see("pump", "verdict.offline")
        a.see("", "audit.pause")
        await asyncio.sleep(0.3)  # time in which it could reach the others
        assert [len(one.log()) for one in (a, b, c)] == [3, 1, 1]
        board.give("b")
        await until(lambda: len(c.log()) >= 2)  # a may have sent the third by then
        board.there["a"] = a.api
        await until(lambda: a.ids() == b.ids() == c.ids() and len(c.ids()) == 3)
        assert b.ids() == ["a:1", "b:2", "a:3"]


async def test_a_restarted_replica_knows_what_was_told(tmp_path: Path) -> None:
    """It loads the log from its file, publishes no unchanged first verdict as news, and continues with higher
    numbers."""
    board = Board()
    async with planes(tmp_path, board, "a") as (a,):
        a.see("pump", "verdict.watched", was=None)
        a.see("fan", "verdict.offline")
        last = a.told.log.last_seq
    async with planes(tmp_path, board, "a") as (a,):
        for device in ("pump", "fan"):
            a.see(device, "verdict.watched", was=None)
        assert a.log() == [
            ("pump", "verdict.watched"),
            ("fan", "verdict.offline"),
            ("fan", "verdict.watched"),
        ]
        assert a.told.log.last_seq > last
        assert [item["kind"] for item in await a.read(f"since={last}")] == ["verdict.watched"]


async def test_what_was_told_before_does_not_hold_up_what_is_new(tmp_path: Path) -> None:
    """More old events than fit into one message wait for the publisher, which knows them: they are dropped, and the
    newest event is published."""
    async with planes(tmp_path, Board(), "a", "b") as (a, b):
        old = [b.see("", "audit.pause") for _ in range(MAX_BATCH + 50)]
        await until(lambda: len(a.log()) == len(old) and not b.feed._pending)
        b.feed._pending.extend(old)
        b.see("", "audit.resume")
        await until(lambda: a.log()[-1] == ("", "audit.resume"))

        assert len(a.log()) == len(old) + 1


async def test_the_last_number_of_each_replica_survives_a_restart(tmp_path: Path) -> None:
    """This includes a replica whose events are older than those read from the file: they are not news."""
    told: list[Event] = []
    for run in range(2):
        store = EventStore(tmp_path / "told.db", origin="a")
        found = await store.open()
        log = MergedLog(EventLog("a", store, is_copied=True))
        log.resume(found.events, found.verdicts, found.origins)
        if run == 0:
            other, own = EventLog("b"), EventLog("a")
            told = [note(other, "audit.pause") for _ in range(3)]
            told += [note(own, "audit.pause") for _ in range(TAIL + 10)]
            assert all(log.publish(event, 1) for event in told)
        assert not any(map(log.is_news, told))
        assert log.is_news(note(other, "audit.pause"))
        await store.close()


def note(history: EventLog, kind: str) -> Event:
    return history.add(
        at=SystemClock().wall(), kind=kind, device_id="", slug=Slug(""), text="", data={}
    )


async def test_a_reader_goes_on_with_another_replica(tmp_path: Path) -> None:
    """A client that has read up to a number on one replica asks another that is behind. It returns no event that was
    already read, and the next one once it is there."""
    async with planes(tmp_path, Board(), "a", "b") as (a, b):
        a.see("pump", "verdict.suspect")
        await until(lambda: len(b.log()) == 1)
        ahead = a.told.log.last_seq + 1
        assert await b.read(f"since={ahead}") == []
        a.see("pump", "verdict.offline")
        a.see("pump", "verdict.watched")
        await until(lambda: len(b.log()) == 3)
        assert [item["kind"] for item in await b.read(f"since={ahead}")] == ["verdict.watched"]


EVENT: Final = {
    "id": "b:7", "seq": 7, "origin": "b", "at": 1.0, "kind": "audit.pause", "device": "", "slug": "", "text": "",
}  # fmt: skip


@pytest.mark.parametrize(
    "body",
    [
        {"events": [{}]},
        {"events": [{"id": "x"}]},
        {"events": 1},
        *(
            {"events": [EVENT | change]}
            for change in (
                {"id": f"b:{2**70}"},
                {"id": "b:0"},
                {"seq": 2**53},
                {"at": "nan"},
                {"marks": [-1]},
                {"data": {"x": float("nan")}},
                {"data": {"x": [float("-inf")]}},
                {"data": {"x": {"y": 2**64}}},
            )
        ),
    ],
)
async def test_what_is_no_event_is_refused(tmp_path: Path, body: object) -> None:
    """An invalid event is answered 400, a replica that does not publish answers 409, and no such event is published."""
    async with planes(tmp_path, Board(), "a", "b") as (a, b):
        good = b.see("pump", "audit.pause").shown()
        async with aiohttp.ClientSession() as client:
            async with client.post(f"{a.api}/v1/peers/events", json=body) as answer:
                assert answer.status == 400
            async with client.post(f"{b.api}/v1/peers/events", json={"events": [good]}) as answer:
                assert answer.status == 409
        await until(lambda: a.log() == [("pump", "audit.pause")])


async def test_marks_and_names_of_incidents_are_the_same_everywhere(tmp_path: Path) -> None:
    """Single events are marked with the incident on each replica, and the incident has the publisher's ID even where
    another replica opens it itself."""
    async with planes(tmp_path, Board(), "a", "b") as (a, b):
        for one in (b, a):
            correlator, now = one.fleet.recorder.incidents._correlator, one.fleet.clock.monotonic()
            groups = ((GroupKind.HOST, "n1"),)
            for number in range(30):
                seq = one.see(f"d{number}", "verdict.offline").seq
                slug = slug_of(DeviceId(f"d{number}"))
                correlator.observe(slug, groups, bad=False, now=now)
                correlator.observe(slug, groups, bad=True, now=now, ref=seq)
        b.fleet.recorder.tick()
        a.fleet.recorder.tick()
        await until(lambda: ("", "incident.opened") in b.log())
        (mine,) = b.fleet.recorder.incidents.all()
        (theirs,) = a.fleet.recorder.incidents.all()
        assert mine.id == theirs.id
        assert mine.id.startswith("a:incident-")
        for one in (a, b):
            singles = [e for e in one.told.log.recent() if e.kind == "verdict.offline"]
            assert {event.incident for event in singles} == {mine.id}
            assert len(singles) == 30


async def test_an_event_that_is_told_back_before_the_answer_came_ends_nothing(
    tmp_path: Path,
) -> None:
    """The stream may return an event while the call that sends it is in progress: the feed keeps running, and sends the
    next one. (Without that a replica ended, seen on a cluster of five hosts.)"""

    class Slow:
        """A publisher whose answer arrives after the event itself."""

        asked = 0

        @property
        def content(self) -> Slow:
            return self

        async def iter_any(self) -> AsyncIterator[bytes]:
            yield b'{"taken": 1}'

        def post(self, *_: object, **__: object) -> Slow:
            self.asked += 1
            return self

        async def __aenter__(self) -> Self:
            b.feed._pending.clear()
            return self

        async def __aexit__(self, *_: object) -> None:
            return

        def raise_for_status(self) -> None:
            return

    async with planes(tmp_path, Board(), "a", "b") as (_, b):
        await until(lambda: b.feed.problem == "")
        b.task.cancel()
        await asyncio.wait([b.task])
        slow = Slow()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(b.feed._hand_over(slow))  # type: ignore[arg-type]
            for count in (1, 2):
                b.see("pump", "audit.pause")
                await until(lambda count=count: slow.asked == count)
                await asyncio.sleep(0.05)
            assert not task.done()
            task.cancel()


async def test_replicas_show_each_other_their_token(tmp_path: Path) -> None:
    """Where the API requires a token, events are copied and sent to the publisher. A replica with another token can do
    neither, and its status says why."""
    board = Board()
    async with AsyncExitStack() as stack:
        a, b, c = [
            await stack.enter_async_context(plane(tmp_path, board, name, token))
            for name, token in (
                ("a", "operator-token-of-all"),
                ("b", "operator-token-of-all"),
                ("c", "another-token-than-theirs"),
            )
        ]
        board.give("a")
        await until(lambda: a.tells and not b.feed.problem)
        for one in (b, c):
            one.see("pump", f"audit.by-{one.name}")
        await until(lambda: b.log() == [("pump", "audit.by-b")])
        await until(lambda: "401" in c.feed.problem)
        assert (a.log(), c.log()) == ([("pump", "audit.by-b")], [])


HOSTILE = {
    "a list": b"[]",
    "no list of events": b'{"items": {}, "taken": []}',
    "deep nesting": b'{"items": ' + b"[" * 1_900,
    "a long number": b'{"items": [], "taken": ' + b"9" * 1_900 + b"}",
    "too many bytes": b'{"items": [], "taken": 1}' + b" " * 20_000,
    "another address": b"",
}


@asynccontextmanager
async def pretender(body: bytes, moved: str = "") -> AsyncIterator[tuple[str, list[str]]]:
    """A server that answers everything with this body, or a redirect; its address, and the paths that were
    requested."""
    asked: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.path)
        headers = {"Location": moved} if moved else {}
        status, kind = 307 if moved else 200, "application/json"
        return web.Response(body=body, status=status, headers=headers, content_type=kind)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    try:
        yield f"http://{host}:{port}", asked
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("what", HOSTILE)
async def test_no_answer_of_another_replica_ends_the_replication(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that publishes, then one that does not, answers with something else than events: this one goes on, and
    publishes as soon as it holds the lease. It follows no redirect."""
    monkeypatch.setattr(event_replication, "_MAX_ANSWER", 2_000)
    monkeypatch.setattr(event_replication, "_LINE", 1_000)
    board = Board()
    async with (
        pretender(b"{}") as (elsewhere, moved),
        pretender(HOSTILE[what], elsewhere if what == "another address" else "") as (api, asked),
        plane(tmp_path, board, "a") as a,
    ):
        board.there["x"] = api
        a.see("pump", "audit.pause")
        board.give("x")
        await until(lambda: {"/v1/events", "/v1/peers/events"} <= set(asked))
        board.give("a")
        await until(lambda: a.log() == [("pump", "audit.pause")] or a.task.done())
        assert not a.task.done()
        assert moved == []


async def test_no_token_is_sent_in_plain_text_where_replicas_use_tls(tmp_path: Path) -> None:
    """Whoever can write to Consul can add a replica. If our API uses TLS, one with an http address is not called."""
    board = Board()
    async with pretender(b"{}") as (api, asked), plane(tmp_path, board, "a") as a:
        board.there["x"] = api
        a.feed._tls = ssl.create_default_context
        reports = ReportReplicator(
            a.fleet, a.leases, lambda: "operator-token-of-all", ssl.create_default_context
        )
        assert reports.others() == []
        a.see("pump", "audit.pause")
        board.give("x")
        await until(lambda: "address is not known" in a.feed.problem)
        board.give("a")
        await until(lambda: a.tells)
        assert asked == []


@pytest.mark.parametrize("api", ["http://x..y:1", "http://.a:1", f"http://{'a' * 64}:1"])
async def test_a_replica_whose_name_can_not_be_looked_up_ends_nothing(
    tmp_path: Path, api: str
) -> None:
    """Reports are still sent to the others; an older version may have stored such an address of its own."""
    board = Board()
    async with pretender(b"{}") as (good, asked), plane(tmp_path, board, "a") as a:
        board.there |= {"x": api, "y": good}
        reports = ReportReplicator(a.fleet, a.leases, lambda: "")
        async with asyncio.TaskGroup() as group:
            task = group.create_task(reports.run())
            for times in (1, 2, 3):
                reports.note_beats([f"cam-{times}"])
                await until(lambda: asked.count("/v1/peers/reports") == times)  # noqa: B023  # at once
            task.cancel()

"""Answers that the real API server can't be made to give on demand: expired versions, silence,
refusals."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from nomad_watchdog.clients.kubernetes import (
    ExpiredError,
    FieldConflictError,
    KubernetesAccess,
    KubernetesClient,
)
from nomad_watchdog.demo.process import free_port
from nomad_watchdog.errors import (
    ConflictError,
    DeniedError,
    StaleError,
    TransientError,
    UserError,
)
from nomad_watchdog.model import AgentSpec, Epoch
from nomad_watchdog.schedulers.kubernetes import KubernetesScheduler, _watch, names
from nomad_watchdog.testing.conformance import record_of

PODS = "/api/v1/namespaces/n/pods"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Device = tuple[KubernetesScheduler, list[str]]
WITH_CREDENTIAL = AgentSpec("default", "1", "h", agent_config={"v": 1, "credential": "hunter2"})


@asynccontextmanager
async def served(handler: Handler, **settings: Any) -> AsyncIterator[KubernetesClient]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    # a watch that the client has closed ends at once
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    client = KubernetesClient(KubernetesAccess(f"http://127.0.0.1:{port}", **settings))
    try:
        yield client
    finally:
        await client.close()
        await runner.cleanup()


def status(code: int, reason: str = "", message: str = "said", **more: Any) -> web.Response:
    body = {"kind": "Status", "code": code, "reason": reason, "message": message, **more}
    return web.json_response(body, status=code)


def one_event(line: bytes) -> Handler:
    """Lists are empty; each watch sends this event and then nothing."""

    async def handler(request: web.Request) -> web.StreamResponse:
        if "watch" not in request.query:
            return page([])
        answer = web.StreamResponse()
        await answer.prepare(request)
        await answer.write(line)
        await asyncio.sleep(30)
        return answer

    return handler


def page(names: list[str], more: str = "", version: str = "7") -> web.Response:
    items = [{"metadata": {"name": name}} for name in names]
    return web.json_response(
        {"items": items, "metadata": {"resourceVersion": version, "continue": more}}
    )


async def test_a_list_whose_end_is_forgotten_is_begun_again() -> None:
    """A 410 between two pages restarts the list; the result contains nothing of the first
    attempt."""
    asked: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        asked.append(request.query.get("continue", ""))
        if asked[-1] == "late":
            return status(410, "Expired")
        return page(["old"], "late") if len(asked) == 1 else page(["a", "b"])

    async with served(handler) as client:
        found = await client.list(PODS)

    assert [one["metadata"]["name"] for one in found.items] == ["a", "b"]
    assert asked == ["", "late", ""]


async def test_a_list_that_always_expires_is_stale_and_no_part() -> None:
    """If no attempt reaches the end, an error is raised; a partial list is never returned (S7)."""

    async def handler(request: web.Request) -> web.Response:
        return status(410, "Expired") if "continue" in request.query else page(["old"], "late")

    async with served(handler) as client:
        with pytest.raises(StaleError, match="expires before all of it"):
            await client.list(PODS)


async def test_a_watch_gives_events_and_bookmarks_and_says_when_its_version_is_forgotten() -> None:
    """A bookmark advances the version; an ERROR event with 410 is an ExpiredError."""

    async def handler(request: web.Request) -> web.StreamResponse:
        assert request.query["allowWatchBookmarks"] == "true"
        answer = web.StreamResponse()
        await answer.prepare(request)
        big = "x" * 300_000  # longer than the line limit of aiohttp
        for kind, thing in (
            ("ADDED", {"metadata": {"resourceVersion": "8", "name": big}}),
            ("BOOKMARK", {"metadata": {"resourceVersion": "9"}}),
            ("ERROR", {"code": 410, "message": "too old resource version"}),
        ):
            await answer.write(json.dumps({"type": kind, "object": thing}).encode() + b"\n")
        return answer

    seen = []
    async with served(handler) as client:
        with pytest.raises(ExpiredError, match="too old"):
            async for event in client.watch(PODS, "7"):
                seen.append((event.kind, event.version))

    assert seen == [("ADDED", "8"), ("BOOKMARK", "9")]


@pytest.mark.parametrize("line", [
    b"{\n", b'{"type": "WHAT", "object": {}}\n', b"[]\n", b"{}\n",
    b'{"type": "ADDED", "object": []}\n', b'{"type": "ADDED", "object": null}\n',
    b'{"type": "ADDED", "object": {"metadata": "x"}}\n',
    b'{"type": "ADDED", "object": {"metadata": null}}\n',
    b'{"type": "ADDED", "object": {"metadata": {"labels": ["x"]}}}\n',
    b'{"type": "ADDED", "object": {"metadata": {"labels": {"x": 1}}}}\n',
    b'{"type": "ERROR", "object": "x"}\n',
])  # fmt: skip
async def test_a_watch_that_talks_nonsense_is_our_error(line: bytes) -> None:
    """Any malformed event ends the watch with one of our errors."""

    async with served(one_event(line)) as client:
        with pytest.raises((TransientError, UserError)):
            async for _ in client.watch(PODS, "7"):
                pytest.fail("that was no event")


async def test_a_rotated_token_is_read_again_after_a_refusal(tmp_path: Path) -> None:
    """A 401 with the old token causes one retry with the new one; if the token is unchanged, the
    call is denied once."""
    file = tmp_path / "token"
    file.write_text("old")
    asked = []

    async def handler(request: web.Request) -> web.Response:
        asked.append(request.headers["Authorization"])
        return page([]) if asked[-1] == "Bearer new" else status(401, "Unauthorized")

    async with served(handler, token_file=str(file)) as client:
        with pytest.raises(DeniedError, match="refuses the credentials"):
            await client.list(PODS)
        file.write_text("new")
        await client.list(PODS)

    assert asked == ["Bearer old", "Bearer old", "Bearer new"]


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (status(409, "AlreadyExists"), ConflictError, "said"),
        (
            status(409, "Conflict", details={"causes": [
                {"reason": "FieldManagerConflict", "field": ".spec.replicas",
                 "message": 'conflict with "kubectl" using apps/v1'}]}),
            FieldConflictError, 'spec.replicas: conflict with "kubectl"',
        ),
        (status(403, "Forbidden", 'cannot create resource "pods"'), DeniedError, "cannot create"),
        (status(403, "Forbidden", "exceeded quota: q"), TransientError, "exceeded quota"),
        (status(422, "Invalid"), UserError, "said"),
        (status(429), TransientError, "said"),
        (status(500), TransientError, "said"),
        (web.Response(status=502, text="<html>proxy"), TransientError, "<html>proxy"),
        (web.Response(text="{"), TransientError, "not complete JSON"),
        (web.Response(text="[]"), TransientError, "not an object"),
    ],
)  # fmt: skip
async def test_an_answer_means(answer: web.Response, kind: type[Exception], words: str) -> None:
    """Each refusal of the API server maps to the error that says what to do next."""

    async def handler(request: web.Request) -> web.Response:
        # a response object can be sent only once
        return web.Response(
            status=answer.status, body=answer.body, content_type=answer.content_type
        )

    async with served(handler) as client:
        with pytest.raises(kind, match=words):
            await client.apply(f"{PODS}/x", {})


async def test_retry_after_is_heeded() -> None:
    """The delay that an overloaded server requests reaches the caller."""

    async def handler(request: web.Request) -> web.Response:
        return web.json_response({"message": "busy"}, status=429, headers={"Retry-After": "7"})

    async with served(handler) as client:
        with pytest.raises(TransientError) as error:
            await client.get("/x")

    assert error.value.retry_after_s == 7.0


async def test_watches_take_no_connection_from_the_calls() -> None:
    """A call is answered even while a hundred watches are open: many namespaces need many
    watches."""

    async def handler(request: web.Request) -> web.StreamResponse:
        if "watch" not in request.query:
            return page([])
        answer = web.StreamResponse()
        await answer.prepare(request)
        await answer.write(b'{"type": "BOOKMARK", "object": {}}\n')
        await asyncio.sleep(30)
        return answer

    opened = 0

    async def follow(client: KubernetesClient) -> None:
        nonlocal opened
        async for _ in client.watch(PODS, "7"):
            opened += 1

    async with served(handler) as client:
        tasks = [asyncio.ensure_future(follow(client)) for _ in range(100)]
        try:
            async with asyncio.timeout(20):
                while opened < 100:
                    await asyncio.sleep(0.05)
                await client.list(PODS)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_watch_that_always_ends_at_once_is_not_asked_for_without_end() -> None:
    """Behind a proxy that cuts every watch, a scheduler backs off, and emits a resync each time
    (S9)."""
    asked = 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal asked
        asked += "watch" in request.query
        return web.Response() if "watch" in request.query else page([])

    async with served(handler) as client:
        scheduler = KubernetesScheduler(client=client, namespace="n")
        hints = scheduler.watch()
        resyncs = 0

        async def follow() -> None:
            nonlocal resyncs
            async for hint in hints:
                resyncs += hint.slugs is None

        task = asyncio.ensure_future(follow())
        await asyncio.sleep(3)  # must not happen: many requests in this time
        often = asked
        async with asyncio.timeout(60):
            while resyncs < 2 or asked < 3:
                await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await hints.aclose()  # type: ignore[attr-defined]

    assert often < 60, f"three kinds were asked for {often} times in 3 s"


async def test_a_watch_that_breaks_is_one_resync() -> None:
    """A lost connection causes one full read, once the next watch has a version to start from."""
    watches = 0
    resyncs = 0

    class Counted(_watch.PendingHints):
        def resync(self) -> None:
            nonlocal resyncs
            resyncs += 1

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal watches
        if "watch" not in request.query:
            return page([])
        watches += 1
        if watches > 1:
            await asyncio.sleep(30)
        return web.Response()

    async with served(handler) as client:
        follow = _watch._WatchLoop(
            client, names.collection("n", "pod"), "pod", "", Counted(), asyncio.Event()
        ).run()
        task = asyncio.ensure_future(follow)
        async with asyncio.timeout(20):
            while watches < 2:
                await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    assert resyncs == 1


async def test_a_watch_that_is_gone_for_good_is_not_silent() -> None:
    """If an unexpected exception ends one watch, the hints raise it at once."""

    meta = {"name": "x", "labels": {names.SLUG: record_of("device-1").slug}}
    pod = {"type": "ADDED", "object": {"metadata": meta, "status": "x"}}  # not expected
    async with served(one_event(json.dumps(pod).encode() + b"\n")) as client:
        hints = KubernetesScheduler(client=client, namespace="n").watch()
        with pytest.raises(AttributeError):
            async with asyncio.timeout(10):
                async for _ in hints:
                    pass


async def test_a_number_of_namespaces_that_can_not_be_written_is_said() -> None:
    """If others change the record on every attempt, preparing fails with a transient error; it does
    not go on without the record."""

    async def handler(request: web.Request) -> web.Response:
        return status(409, "Conflict") if request.method == "PATCH" else status(404, "NotFound")

    async with served(handler) as client:
        scheduler = KubernetesScheduler(client=client, namespace="n")
        with pytest.raises(TransientError, match="changed by another writer"):
            await scheduler.prepare([])


async def test_a_start_outlasts_the_controllers_first_words() -> None:
    """An object whose status is rewritten repeatedly for 0.2 s is still changed: retries without a
    delay would all lose."""
    record, spec = record_of("device-1"), AgentSpec("default", "1", "h")
    until = 0.0
    kept: dict[str, Any] = {}

    async def handler(request: web.Request) -> web.Response:
        nonlocal until
        if request.method == "PATCH":
            now = asyncio.get_running_loop().time()
            until = until or now + 0.2
            body = await request.json()
            if now < until:
                kept.update(body)
                labels = {**body["metadata"]["labels"], names.EPOCH: "1"}
                kept["metadata"] = {**body["metadata"], "labels": labels, "uid": "u"}
                return status(409, "Conflict")
            return web.json_response({**body, "metadata": {**body["metadata"], "uid": "u"}})
        return web.json_response(kept)

    async with served(handler) as client:
        scheduler = KubernetesScheduler(client=client, namespace="n")

        assert await scheduler.ensure(record, Epoch(2), spec) == 1


@asynccontextmanager
async def one_device(epoch: int, answers: dict[str, web.Response]) -> AsyncIterator[Device]:
    """A scheduler with its device at this epoch, and the requests made for it; `answers` override
    the server's responses to some of them."""
    asked: list[str] = []
    there: dict[str, Any] = {}

    async def handler(request: web.Request) -> web.Response:
        what = "secret" if "/secrets/" in request.path else "workload"
        asked.append(f"{request.method} {what}")
        if (refusal := answers.get(asked[-1])) is not None:
            return web.Response(status=refusal.status, body=refusal.body)
        if request.method != "PATCH" or what == "secret":
            return web.json_response(there)
        body = await request.json()
        labels = {**body["metadata"]["labels"], names.EPOCH: str(epoch)}
        there.update(body, metadata={**body["metadata"], "labels": labels, "uid": "u"})
        if body["metadata"]["resourceVersion"] == "1" and asked.count("PATCH workload") == 1:
            there["metadata"]["resourceVersion"] = "7"
            return status(409, "Conflict")
        return web.json_response(there)

    async with served(handler) as client:
        yield KubernetesScheduler(client=client, namespace="n"), asked


async def test_a_roll_out_makes_the_credential_once() -> None:
    """After the conflict that reveals the earlier epoch no second Secret is written: it is created,
    then given its owner, and the earlier one is deleted."""
    async with one_device(1, {}) as (scheduler, asked):
        await scheduler.ensure(record_of("device-1"), Epoch(2), WITH_CREDENTIAL)

    assert asked == [
        "PATCH secret", "PATCH workload", "GET workload", "PATCH workload", "PATCH secret",
        "DELETE secret",
    ]  # fmt: skip


async def test_a_late_start_takes_its_credential_back_once() -> None:
    """A start that is refused for its epoch deletes its Secret, and does so only once."""
    async with one_device(3, {}) as (scheduler, asked):
        with pytest.raises(ConflictError, match="is at epoch 3"):
            await scheduler.ensure(record_of("device-1"), Epoch(2), WITH_CREDENTIAL)

    assert asked.count("DELETE secret") == 1


async def test_a_failed_clean_up_does_not_hide_what_was_wrong() -> None:
    """The error for a refused workload is reported even if its Secret can't be deleted."""
    answers = {
        "PATCH workload": status(422, "Invalid", "no such field"),
        "DELETE secret": status(403, "Forbidden", "cannot delete"),
    }
    async with one_device(1, answers) as (scheduler, asked):
        with pytest.raises(UserError, match="no such field"):
            await scheduler.ensure(record_of("device-1"), Epoch(2), WITH_CREDENTIAL)

    assert asked[-1] == "DELETE secret"

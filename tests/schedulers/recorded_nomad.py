"""Nomad's HTTP API as versions 1.6.3 and 1.11.3 answered it, where they differ.

Versions from 1.7 on are not open source, so that no test may build one; their answers were recorded
on 1.11.3. With a newer `nomad` on PATH the whole suite runs against that instead.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

from nomad_watchdog.clients.nomad import NomadAccess, NomadClient

PAGE = 2
"""Rows per page of a list that is paged by create index."""


class RecordedNomad:
    """One server of a version. `requests` are those that it received: method, path and query."""

    def __init__(self, version: str = "1.11.3") -> None:
        self.versions = [version]
        self.members_denied = False
        self.jobs: dict[str, Any] = {}
        self.children: list[dict[str, Any]] = []
        self.allocations: list[dict[str, Any]] = []
        self.requests: list[tuple[str, str, dict[str, str]]] = []

    def since(self, *version: int) -> bool:
        """Whether the server that answers is of at least this version."""
        return tuple(map(int, self.versions[0].split("."))) >= version

    async def members(self, _request: web.Request) -> web.Response:
        if self.members_denied:
            return web.Response(status=403, text="Permission denied")
        tags = [{"build": version, "role": "nomad"} for version in self.versions]
        return web.json_response({"Members": [{"Status": "alive", "Tags": tag} for tag in tags]})

    async def parse(self, request: web.Request) -> web.Response:
        text = (await request.json())["JobHCL"]
        if "disconnect {" in text and not self.since(1, 8):
            said = 'input.hcl:1,1-2: Unsupported block type; Blocks of type "disconnect" are not expected here.'
            return web.Response(status=400, text=f"Failed to parse job: {said}")
        group: dict[str, Any] = {
            "Name": "agent",
            "Count": 1,
            "MaxClientDisconnect": 3600 * 10**9,
            "Meta": {"replace_lost": "true"} if "replace" in text else None,
            "ReschedulePolicy": {"Attempts": 0, "Unlimited": True},
            "RestartPolicy": {"Attempts": 0, "Mode": "fail"},
            "EphemeralDisk": {"SizeMB": 10},
        }
        task: dict[str, Any] = {
            "Name": "agent",
            "Driver": "mock_driver",
            "KillTimeout": 10**9,
            "LogConfig": {"Disabled": True},
            "DispatchPayload": {"File": "device.json"},
        }
        if self.since(1, 8):
            group["Disconnect"] = None
        if self.since(1, 11):
            task["Secrets"] = None
        keys = ["device_id", "slug", "epoch", "spec_hash", "agent_class", "shard"]
        parameterized = {"Payload": "required", "MetaRequired": keys}
        job = {"Type": "batch", "ParameterizedJob": parameterized}
        return web.json_response({**job, "TaskGroups": [{**group, "Tasks": [task]}]})

    async def validate(self, _request: web.Request) -> web.Response:
        return web.json_response({"ValidationErrors": None, "Error": ""})

    async def register(self, request: web.Request) -> web.Response:
        job = (await request.json())["Job"]
        self.jobs[job["ID"]] = job
        return web.json_response({"JobModifyIndex": 10})

    async def job(self, request: web.Request) -> web.Response:
        found = self.jobs.get(request.match_info["job"])
        return web.json_response(found) if found else web.Response(status=404, text="job not found")

    async def dispatch(self, request: web.Request) -> web.Response:
        """The answer to the loser of a race: on 1.11.3 a job that does not exist, on 1.6.3 its own
        second job."""
        body = await request.json()
        parent = request.match_info["job"]

        def child(stamp: int, suffix: str) -> dict[str, Any]:
            name = f"{parent}/dispatch-{body['IdPrefixTemplate']}-1700000000-{suffix}"
            return {"ID": name, "ParentID": parent, "Meta": body["Meta"], "SubmitTime": stamp,
                    "Status": "running", "Stop": False}  # fmt: skip

        winner, loser = child(1, "aaaaaaaa"), child(2, "bbbbbbbb")
        self.children = [winner] if self.since(1, 11, 2) else [winner, loser]
        told = {"DispatchedJobID": loser["ID"], "EvalID": "e", "Index": 13, "JobCreateIndex": 13}
        return web.json_response(told, headers={"X-Nomad-Index": "13"})

    async def deregister(self, request: web.Request) -> web.Response:
        for one in self.children:
            one["Stop"] = one["Stop"] or one["ID"] == request.match_info["job"]
        return web.json_response({})

    async def list_jobs(self, request: web.Request) -> web.Response:
        prefix = request.query.get("prefix", "")
        rows = [one for one in self.children if one["ID"].startswith(prefix)]
        return web.json_response(rows, headers={"X-Nomad-Index": "13"})

    async def list_allocations(self, request: web.Request) -> web.Response:
        """Paged: a page begins at the index and id of its first row. 1.6.3 compares these as
        text."""
        headers = {"X-Nomad-Index": "13"}
        if "per_page" not in request.query:
            return web.json_response(self.allocations, headers=headers)

        def place(token: str) -> Any:
            index, _, name = token.partition(".")
            return (int(index or 0), name) if self.since(1, 11) else token

        tokens = [f"{one['CreateIndex']}.{one['ID']}" for one in self.allocations]
        asked = place(request.query.get("next_token", ""))
        rest = [n for n, token in enumerate(tokens) if place(token) >= asked]
        page = rest[:PAGE]
        if len(rest) > PAGE:
            headers["X-Nomad-NextToken"] = tokens[rest[PAGE]]
        return web.json_response([self.allocations[n] for n in page], headers=headers)

    async def empty(self, _request: web.Request) -> web.Response:
        return web.json_response([], headers={"X-Nomad-Index": "13"})

    @asynccontextmanager
    async def client(self) -> AsyncIterator[NomadClient]:
        """A client for this server."""

        @web.middleware
        async def note(request: web.Request, handler: Any) -> web.StreamResponse:
            self.requests.append((request.method, request.path, dict(request.query)))
            answer: web.StreamResponse = await handler(request)
            return answer

        app = web.Application(middlewares=[note])
        app.add_routes(
            [
                web.get("/v1/agent/members", self.members),
                web.post("/v1/jobs/parse", self.parse),
                web.post("/v1/validate/job", self.validate),
                web.post("/v1/jobs", self.register),
                web.get("/v1/jobs", self.list_jobs),
                web.get("/v1/allocations", self.list_allocations),
                web.get("/v1/evaluations", self.empty),
                web.post("/v1/job/{job}/dispatch", self.dispatch),
                web.get("/v1/job/{job}", self.job),
                web.delete("/v1/job/{job:.+}", self.deregister),
            ]
        )
        async with TestServer(app) as server:
            one = NomadClient(NomadAccess(address=str(server.make_url("")).rstrip("/")))
            try:
                yield one
            finally:
                await one.close()

"""Agent files of another version, fetched through any replica."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nomad_watchdog import private_files
from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.replicas.leases import Replica
from nomad_watchdog.replicas.report_replication import VIA, AgentFiles
from nomad_watchdog.schedulers import agent_zipapp
from tests.api.conftest import ServedApi, served
from tests.attacks.table import Attack

BODY = b"#!/usr/bin/env python3\nPK" + b"x" * 100_000
SHA256 = hashlib.sha256(BODY).hexdigest()


@asynccontextmanager
async def replicas(folder: Path) -> AsyncIterator[tuple[ServedApi, ServedApi, Path, Path]]:
    """Two replicas that know each other, and the folder of files of each; only the second has the file."""
    homes = [folder / "one", folder / "two"]
    for home in homes:
        private_files.folder(home / "agent-files")
    agent_zipapp.published(homes[1], SHA256).write_bytes(BODY)
    async with served(homes[0]) as first, served(homes[1]) as second:
        gone = Replica("gone", "http://127.0.0.1:1", 0.0, 0, "1")
        for mine, home, other in ((first, homes[0], second), (second, homes[1], first)):
            known = [gone, Replica("other", other.base, 0.0, 0, "1")]
            mine.app[CONTEXT].fetch_file = AgentFiles(home, lambda known=known: known).fetch  # type: ignore[misc]
        yield first, second, homes[0], homes[1]


async def got(served_api: ServedApi, sha256: str, **headers: str) -> tuple[int, bytes]:
    path = f"{served_api.base}/artifacts/{sha256}/watchdog-agent.pyz"
    async with served_api.client.get(path, headers=headers) as answer:
        return answer.status, await answer.read()


async def test_a_file_of_another_replica_is_served_by_any(tmp_path: Path) -> None:
    """A replica without the file fetches it from one that has it, and then has the file itself."""
    async with replicas(tmp_path) as (first, second, home, _):
        assert await got(first, SHA256, Via=VIA) == (404, (await got(first, SHA256, Via=VIA))[1])
        assert await got(first, SHA256) == (200, BODY)
        kept = agent_zipapp.published(home, SHA256)
        assert kept.stat().st_mode & 0o777 == 0o600
        assert await got(first, SHA256, Via=VIA) == await got(second, SHA256) == (200, BODY)


async def test_no_replica_asks_for_ever(tmp_path: Path) -> None:
    """A file that no replica has is a 404: each replica asks the others once, and those ask no further."""
    async with replicas(tmp_path) as (first, second, *_):
        for served_api in (first, second):
            assert (await got(served_api, "0" * 64))[0] == 404
            assert (await got(served_api, "../" * 3))[0] == 404


@pytest.mark.attack("H15", "a replica that serves another agent file under the SHA-256 of a job")
async def test_h15_another_file_is_not_passed_on(tmp_path: Path, attack: Attack) -> None:
    """A file whose SHA-256 differs from the requested one is neither served nor kept."""
    async with replicas(tmp_path) as (first, _, home, other):
        for body in (BODY + b"x", BODY[:-1], b""):
            agent_zipapp.published(other, SHA256).write_bytes(body)
            assert (await got(first, SHA256))[0] == 404
            assert not agent_zipapp.published(home, SHA256).exists()
            attack.tried += 1
        agent_zipapp.published(other, SHA256).write_bytes(BODY)
        assert await got(first, SHA256) == (200, BODY)
    attack.result = f"refused {attack.tried} of {attack.tried} times; the right file is served"

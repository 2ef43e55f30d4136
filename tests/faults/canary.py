"""S10 from outside: search for the tokens wherever they must not appear."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from tests.e2e import audit

if TYPE_CHECKING:
    from tests.faults.world import World


async def search(world: World, found: audit.Findings) -> None:
    """No token is in a log, page, job, catalogue or command line, plain or in base64."""
    texts = {
        f"the log {program.log}": program.log.read_text(errors="replace")
        for program in (world.program, *world.others)
    }
    for path in ("/", "/metrics", "/v1/status", "/v1/events", "/v1/agents"):
        texts[path] = str((await world.call("GET", path))[1])
    jobs = await world.jobs()
    texts["Nomad's jobs"] = json.dumps(jobs)
    for job in jobs[:3]:
        url = f"{world.where.nomad}/v1/job/{quote(job['ID'], safe='')}"
        texts[f"job {job['ID']}"] = json.dumps(await audit.get(world.session, url))
    url = f"{world.where.consul}/v1/catalog/service/{world.where.service}"
    texts["Consul's catalogue"] = json.dumps(await audit.get(world.session, url))
    texts["somebody's argv"] = "\n".join(_command_lines())
    for whose, token in _tokens(world):
        coded = base64.b64encode(token.encode()).decode().rstrip("=")
        for place, text in texts.items():
            told = token in text or coded in text
            found.expect(not told, "S10", f"{whose} is in {place}")


def _tokens(world: World) -> Iterator[tuple[str, str]]:
    yield "the API's token", world.token
    if (key_file := world.api.get("agent_key_file")) is not None:
        yield "the key of agents' credentials", Path(key_file).read_text().strip()
    for name in ("nomad-reconciler", "consul-reconciler", "consul-watchdog"):
        if (file := world.site.secret_file(name)) is not None:
            yield f"the token {name}", file.read_text().strip()


def _command_lines() -> Iterator[str]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                yield (entry / "cmdline").read_bytes().decode(errors="replace")

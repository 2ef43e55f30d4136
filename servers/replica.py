"""A control plane as a child process, for tests and benchmarks; several can share the same stores."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import quote

import aiohttp

from nomad_watchdog.demo.process import Process, clean_environment, free_port
from nomad_watchdog.errors import TerminalError, TransientError
from servers.ready import pause_s

_CALL_S: Final = 5.0


class ControlPlane:
    """``async with ControlPlane(folder, "a", text) as plane: … plane.call("GET", "/v1/leases")``.

    `config`: the text of the HCL file, in which ``{root}`` and ``{port}`` are replaced. `token`: the bearer token that
    `call` sends to the API.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        config: str,
        *,
        env: Mapping[str, str] | None = None,
        token: str = "",
    ) -> None:
        self.name = name
        self.root = folder / name
        self.port = free_port()
        self.api = f"http://127.0.0.1:{self.port}"
        self.file = self.root / "nomad-watchdog.hcl"
        self.log = self.root / "run.log"
        self.root.mkdir(parents=True, exist_ok=True)
        filled = config.replace("{root}", str(self.root)).replace("{port}", str(self.port))
        self.file.write_text(filled)
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._env = clean_environment() | dict(env or {})
        self._process: Process | None = None
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            headers=self._headers, timeout=aiohttp.ClientTimeout(total=_CALL_S)
        )
        try:
            await self.start()
            await self.ready()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            await self._process.terminate(15.0)
        if self._session is not None:
            await self._session.close()

    @property
    def process(self) -> Process:
        """The process. Raises TerminalError before the first start."""
        if self._process is None:
            raise TerminalError(f"{self.name} was not started")
        return self._process

    async def start(self) -> None:
        """Start `nomad-watchdog run`; a restart uses the same port."""
        argv = [sys.executable, "-P", "-m", "nomad_watchdog", "--config", str(self.file), "run"]
        self._process = Process.start(argv, log=self.log, env=self._env)

    async def ready(self, timeout_s: float = 60.0) -> None:
        """Wait until both stores have been read. Raises TerminalError with the end of its log."""
        await self.until("/v1/status", lambda status: bool(status["ready"]), timeout_s)

    async def until(self, path: str, test: Any, timeout_s: float = 30.0) -> Any:
        """Poll until the response passes the test; return that response.

        Raises TerminalError with the end of the log on timeout, or if the process has ended."""
        began = time.monotonic()
        last: Any = None
        while (
            waited_s := time.monotonic() - began
        ) < timeout_s and self.process.returncode is None:
            try:
                last = await self.call("GET", path)
                if test(last):
                    return last
            except TransientError as error:
                last = str(error)
            await asyncio.sleep(pause_s(waited_s))
        raise TerminalError(
            f"{self.name}: {path} did not get there; last: {str(last)[:500]}; its log ends:\n"
            f"{self.process.log_tail()}"
        )

    async def call(self, method: str, path: str, body: object = None) -> Any:
        """Send one request to the API. Raises TransientError for anything other than a 2xx."""
        if self._session is None:
            raise TerminalError(f"{self.name} was not entered")
        try:
            async with self._session.request(method, self.api + path, json=body) as answer:
                if answer.status >= 300:
                    text = (await answer.text())[:300]
                    raise TransientError(f"{method} {path}: {answer.status} {text}")
                return await answer.json() if answer.status != 204 else None
        except (aiohttp.ClientError, TimeoutError) as error:
            raise TransientError(f"{method} {path}: {error!r}") from error

    async def register(self, name: str, **wish: object) -> Any:
        path = f"/v1/devices/{quote(name, safe='')}"
        return await self.call("PUT", path, {"address": "127.0.0.1"} | wish)

    async def held(self) -> set[int]:
        """The shards that it reports to hold."""
        leases = await self.call("GET", "/v1/leases")
        return {one["shard"] for one in leases["shards"] if one["holder"] == leases["replica"]}

    def pause(self) -> None:
        """Send SIGSTOP: its sockets stay open, and nothing is answered."""
        self.process.send(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send(signal.SIGCONT)

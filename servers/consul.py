"""A real Consul on this machine: a server with a data directory, and client agents that join it.

Without ``-dev``, which stores nothing and so cannot show the effect of a restart.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import aiohttp

from nomad_watchdog.demo.process import Process, Running, free_port
from nomad_watchdog.errors import TerminalError
from servers.binaries import find

log = logging.getLogger(__name__)

_POLL_S: Final = 0.05
_CALL_S: Final = 2.0


class ConsulServer(Running):
    """``async with ConsulServer(folder) as consul: … consul.http_addr``.

    Ports are chosen once, so that `start` after `stop` or `kill` starts the same server again.
    `max_connections`: Consul's ``limits.http_max_conns_per_client``. `tls`: Consul's ``tls.https`` block
    (``ca_file``, ``cert_file``, ``key_file``, ``verify_incoming``); with it `https_addr` is served as well. `join`: run
    as a client agent of that server, as on each node of a cluster; `node` must then be a unique name. For several
    servers use `servers.cluster`.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        acl: bool = False,
        max_connections: int = 200,
        node: str = "watchdog-consul",
        join: ConsulServer | None = None,
        tls: Mapping[str, object] | None = None,
    ) -> None:
        self.data_dir = data_dir
        self.node = node
        self.token: str = join.token if join is not None else str(uuid.uuid4()) if acl else ""
        """Management token if ACLs are enabled; secret."""
        self.http_port = free_port()
        self.http_addr = f"http://127.0.0.1:{self.http_port}"
        self._tls = tls
        self._https_port = free_port() if tls else -1
        self.https_addr = f"https://127.0.0.1:{self._https_port}" if tls else ""
        self.serf_port = free_port()
        self._server_port = free_port()
        self._max_connections = max_connections
        self._join = join
        self._process: Process | None = None

    @property
    def pid(self) -> int:
        """PID of the running server. Raises TerminalError if it was not started."""
        return self._running().pid

    @property
    def log_file(self) -> Path:
        return self.data_dir / "consul.log"

    @property
    def serf_address(self) -> str:
        """The address at which others join it."""
        return f"127.0.0.1:{self.serf_port}"

    async def start(self, timeout_s: float = 60.0) -> None:
        """Start it, and wait until it has a leader and has passed its own health check (before that it rejects
        sessions). Raises TerminalError with the end of its log if it does not start."""
        if self._process is not None and self._process.returncode is None:
            return
        program = await asyncio.to_thread(find, "consul")
        self.data_dir.mkdir(parents=True, exist_ok=True)
        config = self.data_dir / "consul.json"
        config.touch(mode=0o600)
        config.write_text(json.dumps(self._config(), indent=1))
        # These variables are meant for clients, and would affect the server's checks.
        env = {key: value for key, value in os.environ.items() if not key.startswith("CONSUL_")}
        argv = [str(program), "agent", f"-config-file={config}"]
        process = Process.start(argv, log=self.log_file, env=env)
        self._process = process
        started = time.monotonic()
        try:
            await self._wait_ready(process, started + timeout_s)
        except BaseException:
            await process.terminate(grace_s=1.0)
            raise
        took_s = round(time.monotonic() - started, 2)
        log.info("consul is up", extra={"address": self.http_addr, "took_s": took_s})

    async def stop(self, grace_s: float = 10.0) -> None:
        """Stop it gracefully. Idempotent."""
        if self._process is not None:
            await self._process.terminate(grace_s)
            self._process = None

    async def kill(self) -> None:
        """Send SIGKILL, like a crash."""
        await self._running().kill()

    def sessions(self, rules: str) -> str:
        """The rules of a policy, plus permission for sessions of this node, which the policies in jobs/ do not include."""
        return f'{rules}\nsession "{self.node}" {{ policy = "write" }}\n'

    def pause(self) -> None:
        """Send SIGSTOP: connections stay open, and nothing is answered."""
        self._running().send(signal.SIGSTOP)

    def resume(self) -> None:
        self._running().send(signal.SIGCONT)

    def _running(self) -> Process:
        if self._process is None:
            raise TerminalError("the Consul server was not started")
        return self._process

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "node_name": self.node,
            "datacenter": "dc1",
            "data_dir": str(self.data_dir / "data"),
            "bind_addr": "127.0.0.1",
            "advertise_addr": "127.0.0.1",
            "client_addr": "127.0.0.1",
            "ports": {
                "http": self.http_port,
                "https": self._https_port,
                "serf_lan": self.serf_port,
                "server": self._server_port,
                "dns": -1,
                "serf_wan": -1,
                "grpc": -1,
                "grpc_tls": -1,
            },
            "connect": {"enabled": False},
            "disable_update_check": True,
            "limits": {"http_max_conns_per_client": self._max_connections},
            "log_level": "INFO",
            "performance": {"raft_multiplier": 1},
            "session_ttl_min": "1s",
        }
        if self._join is None:
            config |= {"server": True, "bootstrap_expect": 1}
        else:
            config |= {"retry_join": [self._join.serf_address]}
        if self._tls:
            config["tls"] = {"https": dict(self._tls)}
        if self.token:
            config["acl"] = {
                "enabled": True,
                "default_policy": "deny",
                "tokens": {"initial_management": self.token, "agent": self.token},
            }
        return config

    async def _wait_ready(self, process: Process, deadline: float) -> None:
        headers = {"X-Consul-Token": self.token} if self.token else {}
        timeout = aiohttp.ClientTimeout(total=_CALL_S)
        async with aiohttp.ClientSession(headers=headers, timeout=timeout) as http:
            while not await self._is_ready(http):
                if process.returncode is not None:
                    raise TerminalError(
                        f"consul ended with {process.returncode}; its log {self.log_file} ends:\n"
                        f"{process.log_tail()}"
                    )
                if time.monotonic() > deadline:
                    raise TerminalError(
                        f"consul did not get ready in time; its log {self.log_file} ends:\n"
                        f"{process.log_tail()}"
                    )
                await asyncio.sleep(_POLL_S)

    async def _is_ready(self, http: aiohttp.ClientSession) -> bool:
        try:
            async with http.get(
                f"{self.http_addr}/v1/health/node/{self.node}?consistent"
            ) as answer:
                if answer.status != 200:
                    return False
                checks = await answer.json()
        except (aiohttp.ClientError, TimeoutError):
            return False
        return any(
            check["CheckID"] == "serfHealth" and check["Status"] == "passing" for check in checks
        )

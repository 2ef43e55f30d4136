"""The program under test as a process: its configuration, its start with or without a fail point, its end."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from nomad_watchdog.demo.process import Process, clean_environment
from servers.netns import Host
from tests.faults.site import BrokenRowError, until

CONFIG = """\
backend  = "nomad"
data_dir = "{root}"
resync   = "{resync}"
api {{
  listen     = "{listen}"
  token_file = "{token_file}"
  webhook_secrets_file = "{secrets_file}"
  {api}
}}
nomad {{
  address    = "{nomad}"
  job_prefix = "{job_prefix}"
  strategy   = "{strategy}"
  {nomad_access}
}}
consul {{
  address = "{consul}"
  prefix  = "{kv_prefix}"
  service = "{service}"
  {consul_access}
}}
registry {{
  kind = "{registry}"
}}
retry {{
  initial = "500ms"
  max     = "5s"
}}
agents {{
  startup_grace = "60s"
  report_stale  = "10s"
  {agents}
}}
log {{
  level = "debug"
}}
{classes}
"""
CLASS = """\
agent_class "{name}" {{
  version      = "{version}"
  kill_timeout = "5s"
  beat         = "2s"
  variables = {{
    python      = "{python}"
    {agents_consul}
  }}
  {probes}
}}
"""
PROBES = """\
probe "tcp" {{
    port     = {port}
    interval = "1s"
    timeout  = "500ms"
    misses   = 2
  }}
"""


MOCK_CLASS = """\
agent_class "default" {{
  template = "{template}"
  beat     = "5s"
  probe "icmp" {{}}
}}
"""


@dataclass(slots=True)
class Program:
    """`nomad-watchdog run` with its own configuration file."""

    root: Path
    listen: str
    host: Host
    session: aiohttp.ClientSession
    process: Process | None = None

    @property
    def api(self) -> str:
        return f"http://{self.listen}"

    @property
    def config(self) -> Path:
        return self.root / "nomad-watchdog.hcl"

    async def start(self, failpoint: str = "", *, module: str = "nomad_watchdog", wait: bool = True,
                    **environment: str) -> None:  # fmt: skip
        """Start `nomad-watchdog run`; returns when it is ready or (with a fail point) has died."""
        env = clean_environment() | environment
        if failpoint:
            env["NOMAD_WATCHDOG_FAILPOINT"] = failpoint
        argv = [sys.executable, "-m", module, "--config", str(self.config), "run"]
        argv = self.host.argv(argv)
        process = self.process = Process.start(argv, log=self.log, env=env)

        async def ready() -> bool:
            if process.returncode is not None:
                if failpoint:
                    return True
                raise BrokenRowError(f"the program ended:\n{process.log_tail()}")
            with suppress(aiohttp.ClientError, TimeoutError):
                async with self.session.get(f"{self.api}/ready") as answer:
                    return answer.status == 200
            return False

        if wait:
            await until(ready, 60.0, "the program is ready")

    @property
    def log(self) -> Path:
        return self.root / "program.log"

    async def command(self, *argv: str) -> None:
        """Run a command; raises BrokenRowError if it fails."""
        words = [sys.executable, "-m", "nomad_watchdog", "--config", str(self.config), *argv]
        child = await asyncio.create_subprocess_exec(
            *self.host.argv(words),
            env=clean_environment(),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await child.communicate()
        if child.returncode != 0:
            raise BrokenRowError(f"nomad-watchdog {' '.join(argv)}: {said.decode()[-1000:]}")

    @property
    def running(self) -> Process:
        assert self.process is not None
        return self.process

    async def killed(self, timeout_s: float = 60.0) -> None:
        """Wait until the program was killed by SIGKILL; anything else would make the row prove nothing."""
        try:
            code = await self.running.wait(timeout_s)
        except TimeoutError:
            raise BrokenRowError("the fail point was never reached") from None
        if code != -signal.SIGKILL:
            raise BrokenRowError(f"the program ended with {code}:\n{self.running.log_tail()}")

    def kill_now(self) -> None:
        """SIGKILL the program, and return only when it has ended."""
        with suppress(ProcessLookupError):
            os.kill(self.running.pid, signal.SIGKILL)
        self.running._popen.wait(10.0)

    async def stop(self) -> None:
        """Send SIGTERM, and wait."""
        if self.process is not None:
            await self.process.terminate(10.0)

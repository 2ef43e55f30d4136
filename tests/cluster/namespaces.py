"""The cluster of jobs/cluster/ on this machine: its scripts, each run on a host that is a network namespace.

Nothing is configured here. What a virtual machine gets from the scripts, a namespace gets too: servers with
TLS and ACLs, their certificates, tokens and policies, the control plane as a job. Needs root.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from nomad_watchdog.dev import nomad as one_nomad
from nomad_watchdog.dev.binaries import find
from nomad_watchdog.dev.netns import Network
from nomad_watchdog.dev.process import Process, Running, clean_environment
from nomad_watchdog.errors import TerminalError

JOBS: Final = Path(__file__).resolve().parents[2] / "jobs"
SERVERS: Final = ("s1", "s2", "s3")
CLIENTS: Final = ("c1", "c2")
PROGRAMS: Final = ("consul", "nomad")
_SCRIPT_S: Final = 300.0


class ScriptedCluster(Running):
    """``async with ScriptedCluster(folder) as cluster: …``: up, bootstrapped, the control plane submitted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.secrets = self.folder / "secrets"
        self.net = Network([*SERVERS, *CLIENTS, "ops"])
        self._processes: list[Process] = []

    def etc(self, name: str) -> Path:
        return self.folder / name / "etc"

    def secret(self, name: str) -> str:
        return (self.secrets / name).read_text().strip()

    def environment(self) -> dict[str, str]:
        """How a caller on the host `ops` reaches the cluster (`make cluster-test` takes the same)."""
        return {
            "NOMAD_ADDR": f"https://{self.net.hosts['s1'].address}:4646",
            "NOMAD_CACERT": str(self.secrets / "ca.pem"),
            "NOMAD_TOKEN": self.secret("nomad-management"),
            "NOMAD_WATCHDOG_TOKEN_FILE": str(self.secrets / "api.token"),
        }

    async def run(
        self, host: str, argv: list[str], env: Mapping[str, str], timeout_s: float = _SCRIPT_S
    ) -> str:
        """A command on a host, to its end: what it said. Raises TerminalError when it fails."""
        command = self.net.hosts[host].argv(argv)
        done = await asyncio.to_thread(
            subprocess.run,
            command,
            env=clean_environment() | dict(env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=False,
        )
        said = done.stdout.decode(errors="replace")
        if done.returncode != 0:
            raise TerminalError(
                f"{argv[0]} on {host} ended with {done.returncode}:\n{said[-4000:]}"
            )
        return said

    async def start(self) -> None:
        """By the scripts of `jobs/cluster`. Raises TerminalError with what a script said."""
        await self.net.start()
        programs = [await asyncio.to_thread(find, name) for name in PROGRAMS]
        hosts = self.net.hosts
        words = [f"server:{name}={hosts[name].address}" for name in SERVERS]
        words += [f"client:{name}={hosts[name].address}" for name in CLIENTS]
        argv = ["bash", str(JOBS / "cluster/secrets.sh"), str(self.secrets), *words]
        await self.run("ops", argv, {})
        for name in (*SERVERS, *CLIENTS):
            role = "server" if name in SERVERS else "client"
            argv = ["bash", str(JOBS / "cluster/node.sh"), role, name, hosts[name].address]
            await self.run(name, argv, self._variables(name))
            for program in programs:
                self._launch(name, program)
        await self.bootstrap()

    async def bootstrap(self) -> None:
        """Again does no harm. Raises TerminalError with the ends of all logs."""
        argv = ["bash", str(JOBS / "cluster/bootstrap.sh"), str(JOBS)]
        programs = {name.upper(): str(await asyncio.to_thread(find, name)) for name in PROGRAMS}
        programs["WATCHDOG"] = str(Path(sys.executable).with_name("nomad-watchdog"))
        try:
            await self.run("s1", argv, self._variables("s1") | programs)
        except TerminalError as error:
            raise TerminalError(f"{error}\n{self.logs()}") from error

    def _variables(self, name: str) -> dict[str, str]:
        hosts = self.net.hosts
        return {
            "SECRETS": str(self.secrets),
            "SERVERS": " ".join(hosts[one].address for one in SERVERS),
            "CLIENTS": " ".join(hosts[one].address for one in CLIENTS),
            "ETC": str(self.etc(name)),
            "DATA": str(self.folder / name),
            "PYTHON": sys.executable,
            "HOME": os.environ.get("HOME", "/"),
        }

    def _launch(self, name: str, program: Path) -> None:
        """As the units of install.sh do it."""
        config = self.etc(name) / f"{program.name}.hcl"
        flag = "-config-file" if program.name == "consul" else "-config"
        argv = self.net.hosts[name].argv([str(program), "agent", f"{flag}={config}"])
        log = self.folder / name / f"{program.name}.log"
        self._processes.append(Process.start(argv, log=log, env=clean_environment()))

    def logs(self) -> str:
        return "\n".join(f"{one.log}:\n{one.log_tail(8)}" for one in self._processes)

    async def stop(self) -> None:
        """The processes, then what their tasks left, then the network."""
        # Clients first, so that nothing is placed anew while their tasks are ended.
        for process in reversed(self._processes):
            with contextlib.suppress(TerminalError):
                await process.terminate(10.0)
        for name in (*SERVERS, *CLIENTS):
            await asyncio.to_thread(one_nomad.clean_up, self.folder / name)
        await self.net.stop()

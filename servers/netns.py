"""Several hosts on one machine: each is a network namespace, connected by a router in another one, isolated from outside.

Packets between two hosts pass through the router, so a partition is a rule there: packets are dropped silently, as
with a dead cable, in one direction if requested, and open connections are affected too. Needs root, `ip` and
`nsenter`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import secrets
import socket
import ssl
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp

from nomad_watchdog.demo.process import Running
from nomad_watchdog.errors import TerminalError

_SUBNET: Final = "10.231.7"
"""Used only inside the namespaces: the machine has no route to it, and concurrent runs share it."""
_ROUTER: Final = f"{_SUBNET}.254"
_CLONE_NEWNET: Final = 0x40000000
_COMMAND_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Host:
    """A host for a server. `namespace` "" = this machine itself."""

    name: str = "local"
    address: str = "127.0.0.1"
    namespace: str = ""

    def argv(self, command: Sequence[str | os.PathLike[str]]) -> list[str | os.PathLike[str]]:
        """The arguments that run a command on the host; the started process becomes the command itself."""
        if not self.namespace:
            return list(command)
        return ["nsenter", f"--net=/run/netns/{self.namespace}", "--", *command]

    def connector(self, trust: ssl.SSLContext | None = None) -> aiohttp.TCPConnector:
        """A connector for an `aiohttp.ClientSession` with connections from this host. `trust`: None = the
        system's CAs."""
        tls: ssl.SSLContext | bool = trust or True
        if not self.namespace:
            return aiohttp.TCPConnector(ssl=tls)
        return aiohttp.TCPConnector(
            ssl=tls,
            socket_factory=lambda info: self.open_socket(info[0], info[1], info[2]),
            force_close=True,
        )

    def open_socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """A socket of this host; it can be used anywhere."""
        with self._entered():
            made = socket.socket(family, kind, protocol)
        made.setblocking(False)
        return made

    def listener(self, port: int = 0) -> socket.socket:
        """A TCP socket that listens on the host's address."""
        made = self.open_socket(socket.AF_INET, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((self.address, port))
        made.listen(128)
        return made

    @contextlib.contextmanager
    def _entered(self) -> Iterator[None]:
        # Each thread has its own namespace; nothing is awaited while this thread has switched.
        if not self.namespace:
            yield
            return
        with Path("/proc/thread-self/ns/net").open("rb") as home:
            with Path(f"/run/netns/{self.namespace}").open("rb") as there:
                _enter(there.fileno())
            try:
                yield
            finally:
                _enter(home.fileno())


LOCAL: Final = Host()


def _enter(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise TerminalError(f"can't enter a network namespace: {os.strerror(number)}")


class Network(Running):
    """``async with Network(["a", "b"]) as net: … net.hosts["a"].address``.

    Everything is removed at the end. Processes in it must be stopped before.
    """

    def __init__(self, names: Sequence[str]) -> None:
        run = f"nwd-{os.getpid():x}{secrets.token_hex(2)}"
        self._router = f"{run}-router"
        self.hosts = {
            name: Host(name, f"{_SUBNET}.{number}", f"{run}-{name}")
            for number, name in enumerate(names, 1)
        }
        self._cuts: set[tuple[str, str]] = set()

    async def start(self) -> None:
        """Create the namespaces. Raises TerminalError if that is not possible."""
        await asyncio.to_thread(self._build)

    async def stop(self) -> None:
        """Remove the namespaces. Idempotent."""
        await asyncio.to_thread(self._remove)

    async def cut(self, sender: str, receiver: str) -> None:
        """Drop everything from `sender` to `receiver`; the other direction stays open."""
        if (sender, receiver) not in self._cuts:
            self._cuts.add((sender, receiver))
            await asyncio.to_thread(self._rule, "add", sender, receiver)

    async def partition(self, one: str, *others: str) -> None:
        """Cut off `one` from each of the others, in both directions."""
        for other in others:
            await self.cut(one, other)
            await self.cut(other, one)

    async def heal(self) -> None:
        """Remove all partitions."""
        for sender, receiver in sorted(self._cuts):
            await asyncio.to_thread(self._rule, "del", sender, receiver)
        self._cuts.clear()

    def _rule(self, verb: str, sender: str, receiver: str) -> None:
        pair = ["from", self.hosts[sender].address, "to", self.hosts[receiver].address]
        _ip("-n", self._router, "rule", verb, *pair, "blackhole")

    def _build(self) -> None:
        router = self._router
        _ip("netns", "add", router)
        _ip("-n", router, "link", "set", "lo", "up")
        switch = ["sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"]
        _run("nsenter", f"--net=/run/netns/{router}", "--", *switch)
        for number, host in enumerate(self.hosts.values(), 1):
            space, port = host.namespace, f"port{number}"
            _ip("netns", "add", space)
            peer = ["type", "veth", "peer", "name", "eth0", "netns", space]
            _ip("-n", router, "link", "add", port, *peer)
            _ip("-n", router, "addr", "add", f"{_ROUTER}/32", "dev", port)
            _ip("-n", router, "link", "set", port, "up")
            _ip("-n", router, "route", "add", host.address, "dev", port)
            _ip("-n", space, "addr", "add", f"{host.address}/32", "dev", "eth0")
            for link in ("lo", "eth0"):
                _ip("-n", space, "link", "set", link, "up")
            _ip("-n", space, "route", "add", _ROUTER, "dev", "eth0")
            _ip("-n", space, "route", "add", "default", "via", _ROUTER)

    def _remove(self) -> None:
        # The veth pairs are removed with the namespaces.
        for name in (*(host.namespace for host in self.hosts.values()), self._router):
            with contextlib.suppress(TerminalError):
                _ip("netns", "del", name)


def _ip(*words: str) -> None:
    _run("ip", *words)


def _run(*argv: str) -> None:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_COMMAND_S, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise TerminalError(f"{argv[0]} can't be run: {error}") from error
    if done.returncode != 0:
        said: Any = done.stderr.strip() or done.returncode
        raise TerminalError(f"{' '.join(argv)}: {said} (network namespaces need root)")

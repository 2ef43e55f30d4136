"""A site of network namespaces: the agent's host, and devices, each behind a pair of interfaces."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from servers.netns import Host
from tests.agent.world import Agent, Listener, Peer, document


def ip(*words: str) -> str:
    """Run `ip` and return its output. Needs root."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=10, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
    return done.stdout


class SitePeer(Peer):
    """The API, on the loopback of a namespace."""

    def __init__(self, host: Host) -> None:
        super().__init__()
        self.host = host

    async def _open(self) -> asyncio.Server:
        return await asyncio.start_server(
            self._serve, sock=self.host.listener(self.port), ssl=self.tls
        )


class Hook(Listener):
    """A receiver of escalations that keeps the bodies of the calls."""

    def __init__(self, host: Host) -> None:
        super().__init__(self._take)
        self.host = host
        self.calls: list[dict[str, Any]] = []

    @property
    def raised(self) -> list[dict[str, Any]]:
        """The distinct firing alerts: a repetition has the same key."""
        return list({c["key"]: c for c in self.calls if c["status"] == "firing"}.values())

    async def _open(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, sock=self.host.listener(self.port))

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
        self.calls.append(json.loads(await reader.readexactly(length)))
        writer.write(b"HTTP/1.1 204 X\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()


class Device:
    """A namespace of its own; `link` is the site's end of the cable."""

    def __init__(self, site: Host, number: int, run: str) -> None:
        self.site, self.link = site, f"dev{number}"
        self.host = Host(self.link, f"10.231.{number}.2", f"{run}-{self.link}")
        self.gateway = f"10.231.{number}.1"
        self.beyond = f"10.232.{number}.0/24"
        self.server: asyncio.Server | None = None

    def build(self) -> None:
        space, site = self.host.namespace, self.site.namespace
        ip("netns", "add", space)
        ip("-n", site, "link", "add", self.link, "type", "veth", "peer", "eth0", "netns", space)
        ip("-n", site, "addr", "add", f"{self.gateway}/30", "dev", self.link)
        ip("-n", space, "addr", "add", f"{self.host.address}/30", "dev", "eth0")
        ip("-n", site, "link", "set", self.link, "up")
        ip("-n", space, "link", "set", "eth0", "up")

    async def serve(self) -> None:
        async def speak(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        self.server = await asyncio.start_server(speak, sock=self.host.listener(7000))

    def cut(self) -> None:
        """Set the site's end of the cable down: a cycle of the interface repairs this."""
        ip("-n", self.site.namespace, "link", "set", self.link, "down")

    def die(self) -> None:
        """Set the device's own end down: the site cannot repair this."""
        ip("-n", self.host.namespace, "link", "set", "eth0", "down")

    def live(self) -> None:
        ip("-n", self.host.namespace, "link", "set", "eth0", "up")

    @property
    def is_up(self) -> bool:
        """Whether the site's end is administratively up."""
        (link,) = json.loads(ip("-n", self.site.namespace, "-j", "link", "show", self.link))
        return "UP" in link["flags"]


class SiteAgent(Agent):
    """An agent in the site's namespace."""

    host: Host

    async def get(self, path: str) -> tuple[int, str]:
        host, _, port = json.loads((self.folder / "agent.json").read_text())["listen"].rpartition(
            ":"
        )
        sock = self.host.open_socket(2, 1)
        async with asyncio.timeout(30):
            await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
            reader, writer = await asyncio.open_connection(sock=sock)
            writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            writer.close()
        return int(head.split()[1]), body.decode()

    def kept(self) -> dict[str, Any]:
        """The state file's section about repairs."""
        state: dict[str, Any] = json.loads((self.folder / "state.json").read_text())["state"]
        return state["repairs"]

    async def outcomes(self) -> list[str]:
        """The outcomes of the attempts, oldest first."""
        return [one["outcome"] for one in (await self.status())["repairs"]["attempts"]]


class Site:
    """`async with a_site(folder) as site`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = f"nwd-{os.getpid():x}{secrets.token_hex(2)}"
        self.host = Host("site", "127.0.0.1", f"{self.run}-site")
        self.peer = SitePeer(self.host)
        self.hook = Hook(self.host)
        self.devices: list[Device] = []
        self.agents: list[SiteAgent] = []

    async def device(self) -> Device:
        """Add a device that answers."""
        device = Device(self.host, len(self.devices) + 1, self.run)
        self.devices.append(device)
        device.build()
        await device.serve()
        return device

    def agent(
        self, device: Device, step: dict[str, Any] | None = None, **changes: Any
    ) -> SiteAgent:
        """An agent, not started, that cycles the device's interface when it is suspect."""
        cycle = {
            "kind": "interface",
            "interface": device.link,
            "budget": 10,
            "window_s": 600.0,
            "cooldown_s": 0.0,
            "timeout_s": 0.6,
            "verify_s": 2.0,
            **(step or {}),
        }
        config = document(
            f"device {device.link}",
            **{
                "address": device.host.address,
                "probes": [{"kind": "icmp", "interval_s": 0.1, "timeout_s": 0.3, "misses": 2}],
                "confirm": [{"kind": "tcp", "port": 7000, "timeout_s": 0.5}],
                "api": [f"http://127.0.0.1:{self.peer.port}"],
                "escalate": {
                    "sinks": [{"kind": "webhook", "url": f"http://127.0.0.1:{self.hook.port}/"}]
                },
                "repairs": [cycle],
                **changes,
            },
        )
        argv = [
            str(word) for word in self.host.argv([sys.executable, "-P", "-m", "watchdog_agent"])
        ]
        agent = SiteAgent(self.folder / f"agent-{len(self.agents)}", config, argv)
        agent.host = self.host
        self.agents.append(agent)
        return agent


@contextlib.asynccontextmanager
async def a_site(folder: Path) -> AsyncIterator[Site]:
    """A site with a listening API and hook; all of it is removed at the end."""
    site = Site(folder)
    ip("netns", "add", site.host.namespace)
    try:
        ip("-n", site.host.namespace, "link", "set", "lo", "up")
        await site.peer.start()
        await site.hook.start()
        yield site
    finally:
        for agent in site.agents:
            await agent.stop()
        for listener in (site.peer, site.hook):
            await listener.stop()
        for device in site.devices:
            if device.server is not None:
                device.server.close()
            ip("netns", "del", device.host.namespace)
        ip("netns", "del", site.host.namespace)

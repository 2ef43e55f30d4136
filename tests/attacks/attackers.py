"""Attackers in a process of their own: ``python attackers.py KIND HOST PORT SOURCE COUNT``.

Each of COUNT connections is opened again when it ends, until SIGTERM. Then the number of connections and of
answers by status is printed as JSON.
"""

from __future__ import annotations

import asyncio
import base64
import json
import signal
import socket
import sys
import time
import zlib
from collections import Counter
from functools import cache
from pathlib import Path

from nomad_watchdog.demo.process import Process, clean_environment

MIB = 1024 * 1024
ZEROS = 40 * MIB
JSON = b"Content-Type: application/json\r\n"


def _head(method: str, path: str, length: int, *more: bytes) -> bytes:
    line = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\n"
    return line.encode() + JSON + b"".join(more) + b"\r\n"


@cache
def compressed() -> bytes:
    """40 MB of zeros, compressed to 40 kB."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)  # 31: gzip's frame
    zeros = bytes(MIB)
    body = b"".join(packer.compress(zeros) for _ in range(ZEROS // MIB)) + packer.flush()
    return _head("PUT", "/v1/devices/x", len(body), b"Content-Encoding: gzip\r\n") + body


def unsigned(length: int = MIB) -> bytes:
    """A webhook that looks signed, with a wrong signature."""
    signature = "v1," + base64.b64encode(bytes(32)).decode()
    signs = f"webhook-id: a\r\nwebhook-timestamp: {int(time.time())}\r\nwebhook-signature: {signature}\r\n"
    return _head("POST", "/v1/webhook", length, signs.encode()) + b" " * length


def deaf() -> bytes:
    """Requests for the largest answer that needs no token, as many as fit on a connection; no answer is read."""
    return b"GET /artifacts/watchdog-agent.pyz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 200


KINDS = {
    "gzip": compressed,
    "webhook": unsigned,
    "silent": lambda: b"",
    "slow": lambda: b"GET /v1/status HTTP/1.1\r\nHost: 127.0.0.1\r\nX-",
    "deaf": deaf,
}


class Attackers:
    """COUNT connections of one kind."""

    def __init__(self, kind: str, host: str, port: int, source: str) -> None:
        self.kind, self.where, self.source = kind, (host, port), source
        self.statuses: Counter[str] = Counter()
        self.made = 0

    async def one(self) -> None:
        """Open one connection after another, forever."""
        loop = asyncio.get_running_loop()
        while True:
            wire = socket.socket(socket.AF_INET)
            wire.setblocking(False)
            try:
                wire.bind((self.source, 0))
                await loop.sock_connect(wire, self.where)
                self.made += 1
                await self._use(loop, wire)
            except OSError:
                self.statuses["closed"] += 1
                await asyncio.sleep(0.005)
            finally:
                wire.close()

    async def _use(self, loop: asyncio.AbstractEventLoop, wire: socket.socket) -> None:
        sent = KINDS[self.kind]()
        if self.kind == "deaf":
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await loop.sock_sendall(wire, sent)
            await asyncio.sleep(3600)
        sending = asyncio.ensure_future(loop.sock_sendall(wire, sent))
        try:
            answer = await loop.sock_recv(wire, 4096)
            self.statuses[answer[9:12].decode() or "closed"] += 1
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)


async def main() -> None:
    kind, host, port, source, count = sys.argv[1:]
    attackers = Attackers(kind, host, int(port), source)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    tasks = [asyncio.ensure_future(attackers.one()) for _ in range(int(count))]
    await stop.wait()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    print(json.dumps({"made": attackers.made, "statuses": attackers.statuses}))


def start(folder: Path, kind: str, port: int, source: str, count: int) -> tuple[Process, Path]:
    """Start such a process; returns it and the file that receives its output."""
    log = folder / f"{kind}-{source}.log"
    argv = [sys.executable, __file__, kind, "127.0.0.1", str(port), source, str(count)]
    return Process.start(argv, log=log, env=clean_environment()), log


if __name__ == "__main__":
    asyncio.run(main())

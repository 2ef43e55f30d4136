"""The image of the agent: agent/Dockerfile."""

from __future__ import annotations

import asyncio
import base64
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from nomad_watchdog.demo.process import free_port
from tests.agent.world import World, document, probe, until
from tests.images import BASE, Buildah, Image, a_base, a_root, assert_confined, opened

pytestmark = [pytest.mark.image, pytest.mark.long]
NAME = "agntup/watchdog-agent"


@pytest.fixture
def image(tmp_path: Path, repository: Path) -> Iterator[Image]:
    """The image built from agent/Dockerfile."""
    buildah = Buildah(tmp_path)
    a_root(tmp_path / "base")
    a_base(buildah, tmp_path / "base")
    buildah("bud", "-q", "--isolation=chroot", f"--build-arg=BASE={BASE}",
            "-t", NAME, repository / "agent")  # fmt: skip
    with opened(buildah, NAME) as it:
        yield it


async def test_the_image_serves_with_a_read_only_root_and_without_root(
    image: Image, world: World, tmp_path: Path
) -> None:
    """Started with the image's settings, as user nobody with a read-only root, the agent is healthy, reports, and ends
    on SIGTERM."""
    assert (image.config["User"], image.config["ExposedPorts"]) == ("65534:65534", {"8080/tcp": {}})
    assert image.env["WATCHDOG_LISTEN"] == "0.0.0.0:8080"
    listen = f"127.0.0.1:{free_port()}"
    told = document(probes=[probe(world.device.port)], api=[f"http://127.0.0.1:{world.peer.port}"])
    encoded = base64.b64encode(json.dumps(told).encode()).decode()
    said = tmp_path / "stderr"
    process = await image.start(
        [], env={"WATCHDOG_CONFIG_B64": encoded, "WATCHDOG_LISTEN": listen}, log=said
    )
    try:
        ready = {"ready": True, "state": "ok"}
        await until(
            lambda: ready.items() <= world.peer.last.items() or process.returncode is not None,
            "ready", 20.0,
        )  # fmt: skip
        assert process.returncode is None, said.read_text()
        host, port = listen.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200 OK")
        writer.close()
        assert_confined(process.pid)
        process.send_signal(signal.SIGTERM)
        await until(lambda: process.returncode is not None, "its end", 60.0)
        assert process.returncode == 128 + signal.SIGTERM
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()

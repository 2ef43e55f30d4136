"""The image of the control plane: jobs/Dockerfile."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from nomad_watchdog.demo.process import free_port
from tests.images import BASE, Buildah, Image, a_base, a_root, assert_confined, opened

pytestmark = [pytest.mark.image, pytest.mark.long, pytest.mark.timeout(1200)]
NAME = "agntup/nomad-watchdog"
STATE = "/var/lib/nomad-watchdog"
TOKEN = "operators-s3cret-token"
CONFIG = """\
backend = "local"
agent_class "default" {
  beat = "1s"
  probe "tcp" {
    port     = %d
    interval = "1s"
    timeout  = "500ms"
  }
}
"""


@pytest.fixture
def image(tmp_path: Path, repository: Path) -> Iterator[Image]:
    """The image built from jobs/Dockerfile, with the packages from a folder of wheels."""
    wheels = tmp_path / "wheels"
    locks = repository / ".ci" / "lock"
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--require-hashes",
         "--only-binary=:all:", "-d", wheels, "-r", locks / "build.txt", "-r", locks / "run.txt"],
        check=True,
    )  # fmt: skip
    buildah = Buildah(tmp_path)
    packages = Path(sys.prefix) / "lib"
    a_root(tmp_path / "base", packages=["pip"], libraries=packages.glob("*/site-packages/**/*.so"))
    a_base(buildah, tmp_path / "base")
    buildah("bud", "-q", "--isolation=chroot", f"--build-arg=BASE={BASE}", "--build-arg=PIP_NO_INDEX=1",
            "--build-arg=PIP_FIND_LINKS=/wheels", f"--volume={wheels}:/wheels:ro",
            "-t", NAME, "-f", repository / "jobs" / "Dockerfile", repository)  # fmt: skip
    with opened(buildah, NAME) as it:
        yield it


async def test_the_image_runs_a_control_plane_and_an_agent_without_root(
    image: Image, tmp_path: Path
) -> None:
    """Started as its configuration says, by `nobody` on a read-only root, it serves, rejects requests without a token,
    keeps its state where the image says, and its own agent watches a device, as the program inside reports. It ends on
    SIGTERM with 0, and knows the device when it is started again."""
    assert (image.config["User"], image.config["ExposedPorts"]) == ("65534:65534", {"9670/tcp": {}})
    assert image.config["Cmd"] == ["run"]
    assert not (image.root / "src").exists()
    device = await asyncio.start_server(lambda _r, w: w.close(), "127.0.0.1", 0)
    port = free_port()
    config, token = tmp_path / "config.hcl", tmp_path / "token"
    config.write_text(CONFIG % device.sockets[0].getsockname()[1])
    token.write_text(TOKEN)
    api = f"http://127.0.0.1:{port}"
    env = {
        "NOMAD_WATCHDOG_CONFIG": "/etc/nomad-watchdog/nomad-watchdog.hcl",
        "NOMAD_WATCHDOG_API_LISTEN": f"127.0.0.1:{port}",
        "NOMAD_WATCHDOG_API_TOKEN_FILE": "/etc/nomad-watchdog/token",
    }
    mounts = {
        "/dev": Path("/dev"), "/proc": Path("/proc"), STATE: image.root / STATE[1:],
        "/etc/nomad-watchdog/token": token,
        "/etc/nomad-watchdog/nomad-watchdog.hcl": config,
    }  # fmt: skip
    said = tmp_path / "said"

    async def shown() -> tuple[int, dict[str, object]]:
        async with session.get(f"{api}/v1/devices/pump-1") as answer:
            return answer.status, await answer.json()

    headers = {"Authorization": f"Bearer {TOKEN}"}
    timeout = aiohttp.ClientTimeout(total=5.0)
    async with device, aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
        for turn in ("first", "second"):
            process = await image.start(image.config["Cmd"], env=env, log=said, mounts=mounts)
            try:
                async with asyncio.timeout(180.0):
                    while True:
                        assert process.returncode is None, said.read_text()[-3000:]
                        try:
                            if turn == "first":
                                wish = {"address": "127.0.0.1"}
                                async with session.put(
                                    f"{api}/v1/devices/pump-1", json=wish
                                ) as answer:
                                    assert answer.status in (200, 201), await answer.text()
                            status, found = await shown()
                        except aiohttp.ClientError:
                            status, found = 0, {}
                        if status == 200 and found["verdict"] == "watched":
                            break
                        await asyncio.sleep(0.2)
                async with session.get(
                    f"{api}/v1/devices", headers={"Authorization": ""}
                ) as answer:
                    assert answer.status == 401
                assert_confined(process.pid)
                if turn == "first":
                    told = await image.execute(
                        process.pid, ["nomad-watchdog", "explain", "pump-1"], env=env
                    )
                    assert "watched" in told, told
                process.send_signal(signal.SIGTERM)
                async with asyncio.timeout(20.0):
                    assert await process.wait() == 0, said.read_text()[-3000:]
            finally:
                if process.returncode is None:
                    process.kill()
                await process.wait()

"""Agents run by kubelet stand-ins, on the session's control plane."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from nomad_watchdog.ids import Slug, parse_device_id, slug_of
from nomad_watchdog.model import AgentSpec, Placement
from nomad_watchdog.schedulers.kubernetes import KubernetesScheduler
from nomad_watchdog.testing.conformance import Rig
from servers.kubelet.__main__ import Kubelet
from servers.kubelet.spec import MARK, Image
from servers.kubernetes import KubernetesCluster

SHIPPED = Path(__file__).parents[2] / "jobs" / "kubernetes" / "device-watchdog.yaml"
MOCK = str(Path(__file__).with_name("mock.kubernetes.yaml"))
AGENT = """
import http.server, os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *words):
        pass
print("agent of", os.environ["DEVICE_ID"], "serves", flush=True)
host, _, port = os.environ["WATCHDOG_LISTEN"].rpartition(":")
http.server.HTTPServer((host, int(port)), Page).serve_forever()
"""
HOG = "hog = [b'x' * (1 << 20) for _ in range(300)]\nimport time\ntime.sleep(60)\n"


def images(folder: Path) -> dict[str, Image]:
    """test/agent lives until SIGTERM, test/failing exits 1 at once, test/hog takes 300 MiB."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, text in (("agent", AGENT), ("failing", "raise SystemExit(1)\n"), ("hog", HOG)):
        file = folder / f"{name}.py"
        file.write_text(text)
        found[f"test/{name}"] = Image((sys.executable, "-S", "-E", str(file)))
    return found


def kubelet(kube: KubernetesCluster, folder: Path, **options: Any) -> Kubelet:
    return Kubelet(kube.kubeconfig, folder / "kubelet", images=images(folder / "images"), **options)


def spec_of(image: str = "test/agent", **changes: Any) -> AgentSpec:
    variables = {"image": image, "cpu_request": "1m", **changes.pop("variables", {})}
    told = f"{sorted(variables.items())} {sorted(changes.items())}"  # equal hash = equal behaviour
    base = AgentSpec("default", "1", told, kill_timeout_s=3.0, variables=variables)
    return replace(base, **changes)


def soon_ready_template(folder: Path) -> str:
    """The path of the shipped template with a faster readiness probe: it begins after 1 s instead
    of 10."""
    text = SHIPPED.read_text()
    assert text.count("initialDelaySeconds: 10") == 1
    template = folder / "soon-ready.yaml"
    template.write_text(text.replace("initialDelaySeconds: 10", "initialDelaySeconds: 1"))
    return str(template)


def soon_ready(spec: AgentSpec, folder: Path) -> AgentSpec:
    """The spec with that template."""
    template = soon_ready_template(folder)
    return replace(spec, template=template, spec_hash=f"{spec.spec_hash} soon ready")


def processes_of(slug: str) -> set[int]:
    """Pids of the live processes of a device's pods, on any node."""
    found = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError, ValueError):
            words = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
            env = dict(one.split("=", 1) for one in words if "=" in one)
            alive = (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
            ours = alive and MARK in env and "DEVICE_ID" in env
            if ours and slug_of(parse_device_id(env["DEVICE_ID"])) == slug:
                found.add(int(entry.name))
    return found


def make_rig(kube: KubernetesCluster, namespace: str, workload: str) -> Rig:
    installation = f"t-{uuid.uuid4().hex[:8]}"

    def scheduler() -> KubernetesScheduler:
        return KubernetesScheduler(
            settings=kube.settings(), namespace=namespace, installation=installation
        )

    def spec(**changes: Any) -> AgentSpec:
        return replace(spec_of(variables={"workload": workload}), **changes)

    async def processes(slug: Slug) -> set[int]:
        return await asyncio.to_thread(processes_of, slug)

    async def crash(placement: Placement) -> None:
        for pid in processes_of(placement.slug):
            os.kill(pid, signal.SIGKILL)

    @asynccontextmanager
    async def break_reads() -> AsyncIterator[None]:
        await kube.kill_process("kube-apiserver")
        try:
            yield
        finally:
            await kube.start_process("kube-apiserver")

    return Rig(
        scheduler=scheduler,
        spec=spec,
        failing_spec=lambda: spec_of("test/failing", variables={"workload": workload}),
        scale_spec=lambda: replace(
            spec(), spec_hash="m", template=MOCK, variables={"workload": workload}
        ),
        processes=processes,
        crash=crash,
        break_reads=break_reads,
        timeout_s=180.0,
        grace_s=3.0,
    )

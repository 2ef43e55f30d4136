"""A substitute for a kubelet where there are no containers: runs pods of the real API server as processes.

It takes the pods that the real scheduler has bound to its node, starts their commands with their
environment, runs their probes as specified, restarts with back-off, kills containers that exceed their memory
limit, reports status, and handles deletion with SIGTERM and the grace period. Limitations: an
image is a command that the caller names; a mount is a directory whose path replaces the mount's path in arguments and
environment, so paths inside files do not resolve; users and
capabilities are not changed; each pod has an address of the loopback network, where 0.0.0.0 means the addresses of
all pods; and a container's resource usage is that of its first process.

It runs in its own process: after SIGSTOP its node is lost while the agents on it keep running.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import aiohttp
import click
from watchdog_agent.runtime.parsing import loads

from nomad_watchdog.clients.kubernetes import KubernetesAccess, KubernetesClient
from nomad_watchdog.demo.process import Process, Running, clean_environment, free_port
from nomad_watchdog.errors import (
    ConflictError,
    NotFoundError,
    StaleError,
    TerminalError,
    TransientError,
    WatchdogError,
)
from servers.kubelet.pages import Use, serve_pages
from servers.kubelet.pod import Pod, now_text
from servers.kubelet.spec import MARK, Image

_BEAT_S: Final = 1.0
_LEASE_S: Final = 40
_RETELL_BEATS: Final = 10


class Kubelet(Running):
    """``async with Kubelet(kubeconfig, folder, images={"agntup/watchdog-agent": Image(…)}) as node: …``

    `subnet`: its pods have addresses 127.<subnet>.x.y. `backoff_s`: the first delay of a crash loop
    (10 s for a real kubelet). `pods`: maximum number of pods.
    """

    def __init__(
        self,
        kubeconfig: Path,
        folder: Path,
        *,
        images: Mapping[str, Image],
        node: str = "node-1",
        subnet: int = 20,
        backoff_s: float = 1.0,
        pods: int = 500,
    ) -> None:
        self.node = node
        self.folder = folder.resolve()
        self._kubeconfig = kubeconfig
        self._options = {
            "node": node,
            "folder": str(self.folder),
            "images": {name: asdict(image) for name, image in images.items()},
            "subnet": subnet,
            "backoff_s": backoff_s,
            "pods": pods,
            "port": free_port(),
        }
        self._process: Process | None = None

    async def __aexit__(self, *error: object) -> None:
        await super().__aexit__(*error)
        await self._leave()

    async def _leave(self) -> None:
        """Delete the node from the cluster: otherwise the scheduler would place pods there until the controllers miss its
        lease (50 s by default)."""
        client = KubernetesClient(KubernetesAccess.discover(str(self._kubeconfig)))
        try:
            with contextlib.suppress(WatchdogError):  # the API server may have ended first
                await client.delete(f"/api/v1/nodes/{self.node}")
        finally:
            await client.close()

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def log_file(self) -> Path:
        return self.folder / "kubelet.log"

    async def start(self, timeout_s: float = 30.0) -> None:
        """Start it and wait until its node is ready. Raises TerminalError with the end of its log."""
        self.folder.mkdir(parents=True, exist_ok=True)
        options = self.folder / "kubelet.json"
        options.write_text(json.dumps(self._options))
        process = Process.start(
            [
                sys.executable,
                "-P",
                "-m",
                __name__,
                "--kubeconfig",
                str(self._kubeconfig),
                str(options),
            ],
            log=self.log_file,
            env=clean_environment(),
        )
        self._process = process
        client = KubernetesClient(KubernetesAccess.discover(str(self._kubeconfig)))
        deadline = time.monotonic() + timeout_s
        try:
            while not await self._is_ready(client):
                if process.returncode is not None or time.monotonic() > deadline:
                    raise TerminalError(f"kubelet {self.node}: {process.log_tail()}")
                await asyncio.sleep(0.05)
        finally:
            await client.close()

    async def _is_ready(self, client: KubernetesClient) -> bool:
        try:
            node = await client.get(f"/api/v1/nodes/{self.node}")
        except (NotFoundError, TransientError):
            return False
        conditions = (node.get("status") or {}).get("conditions") or []
        tainted = (node.get("spec") or {}).get("taints")
        up = any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)
        return up and not tainted

    async def stop(self) -> None:
        """Stop it and all processes of its pods, without informing the API server. Idempotent."""
        if self._process is not None:
            await self._process.terminate(10.0)
            self._process = None
        self.kill_pods()

    def pause(self) -> None:
        """Cut off the node: it sends nothing, and its agents keep running."""
        self._running().send(signal.SIGSTOP)

    def resume(self) -> None:
        self._running().send(signal.SIGCONT)

    async def crash(self) -> None:
        """Kill the node and all processes that ran on it, like a machine failure."""
        await self._running().kill()
        self.kill_pods()

    def kill_pods(self) -> None:
        for pid in list(_pids(self.folder)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self, uid: str = "") -> set[int]:
        """PIDs of the running processes of a pod, or of all pods."""
        return set(_pids(self.folder, uid))

    def _running(self) -> Process:
        if self._process is None:
            raise TerminalError(f"kubelet {self.node} was not started")
        return self._process


def _pids(folder: Path, uid: str = "") -> Iterator[int]:
    wanted = f"{MARK}={folder}/".encode() + uid.encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "environ").read_bytes().split(b"\0")
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            continue
        if state != "Z" and any(word.startswith(wanted) for word in words):
            yield int(entry.name)


class _Node:
    """The kubelet substitute itself."""

    def __init__(
        self, client: KubernetesClient, http: aiohttp.ClientSession, options: Mapping[str, Any]
    ) -> None:
        self.client, self.http, self.options = client, http, options
        self.name: str = options["node"]
        self.folder = Path(options["folder"])
        self.images = {
            name: Image(tuple(one["entrypoint"]), one["env"])
            for name, one in options["images"].items()
        }
        self.pods: dict[str, Pod] = {}
        self._number = 0

    async def run(self) -> None:
        await self.register()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(serve_pages(self.options["port"], self.find_log, self.uses))
            tasks.create_task(self.beat())
            tasks.create_task(self.retell())
            tasks.create_task(self.follow(tasks))

    def find_log(self, namespace: str, name: str, container: str) -> Path | None:
        for pod in self.pods.values():
            meta = pod.pod["metadata"]
            if (meta["namespace"], meta["name"]) == (namespace, name):
                return pod.log_file(container)
        return None

    def uses(self) -> Iterator[Use]:
        for pod in self.pods.values():
            yield from pod.uses()

    async def register(self) -> None:
        """Create the node, and the lease that tells the controllers that it is alive."""
        meta = {"name": self.name, "labels": {"kubernetes.io/hostname": self.name}}
        node = {"apiVersion": "v1", "kind": "Node", "metadata": meta}
        lease = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self.name},
        }
        for path, body in (("/api/v1/nodes", node), (_LEASES, lease)):
            while True:
                try:
                    await self.client.create(path, body)
                    break
                except ConflictError:
                    break
                except (
                    WatchdogError
                ):  # the namespace of the leases is made a moment after the start
                    await asyncio.sleep(0.1)
        await self.tell_node()

    async def tell_node(self) -> None:
        now = now_text()
        ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "stand-in"}
        room = {"cpu": "1000", "memory": "1000Gi", "pods": str(self.options["pods"])}
        status = {
            "conditions": [ready | {"lastHeartbeatTime": now, "lastTransitionTime": now}],
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self.options["port"]}},
            "capacity": room,
            "allocatable": room,
        }
        await self.client.call(
            "PATCH", f"/api/v1/nodes/{self.name}/status", body={"status": status},
            content="application/strategic-merge-patch+json",
        )  # fmt: skip

    async def beat(self) -> None:
        last_status = time.monotonic()
        while True:
            spec = {
                "holderIdentity": self.name,
                "leaseDurationSeconds": _LEASE_S,
                "renewTime": now_text().replace("Z", ".000000Z"),
            }
            began = time.monotonic()
            try:
                await self.client.call(
                    "PATCH", f"{_LEASES}/{self.name}", body={"spec": spec},
                    content="application/merge-patch+json",
                )  # fmt: skip
                if began - last_status > 2 * _BEAT_S:
                    await self.tell_node()
                    last_status = began
            except WatchdogError as error:
                click.echo(f"beat: {error}")
            await asyncio.sleep(_BEAT_S)

    async def retell(self) -> None:
        """Report again what could not be reported, and correct pod statuses that the controllers have overwritten while
        the node was unreachable."""
        beats = 0
        while True:
            await asyncio.sleep(_BEAT_S)
            beats += 1
            for pod in list(self.pods.values()):
                if pod.owes:
                    await pod.tell()
                elif beats % _RETELL_BEATS == 0 and pod.is_written_over():
                    await pod.retell()

    async def follow(self, tasks: asyncio.TaskGroup) -> None:
        """List and watch the pods of this node."""
        fields = f"spec.nodeName={self.name}"
        while True:
            try:
                listed = await self.client.list("/api/v1/pods", fields=fields)
                for pod in listed.items:
                    self.seen(pod, tasks)
                for uid in self.pods.keys() - {one["metadata"]["uid"] for one in listed.items}:
                    self.pods[uid].leave()
                version = listed.version
                while True:
                    async for event in self.client.watch("/api/v1/pods", version, fields=fields):
                        version = event.version or version
                        if event.kind == "DELETED":
                            if gone := self.pods.get(event.object["metadata"]["uid"]):
                                gone.leave()
                        elif event.kind != "BOOKMARK":
                            self.seen(event.object, tasks)
            except (StaleError, WatchdogError) as error:
                click.echo(f"pods: {error}")
                await asyncio.sleep(0.3)

    def seen(self, found: Mapping[str, Any], tasks: asyncio.TaskGroup) -> None:
        uid = found["metadata"]["uid"]
        known = self.pods.get(uid)
        if known is not None:
            known.seen(found)
            return
        ended = (found.get("status") or {}).get("phase") in ("Failed", "Succeeded")
        if ended and not found["metadata"].get("deletionTimestamp"):
            return
        self._number += 1
        folder = self.folder / uid
        folder.mkdir(parents=True, exist_ok=True)
        pod = self.pods[uid] = Pod(
            found,
            client=self.client,
            http=self.http,
            images=self.images,
            folder=folder,
            ip=f"127.{self.options['subnet']}.{self._number // 250 % 250}.{self._number % 250 + 1}",
            backoff_s=self.options["backoff_s"],
        )
        tasks.create_task(self.live(pod))

    async def live(self, pod: Pod) -> None:
        try:
            await pod.live()
        finally:
            self.pods.pop(pod.uid, None)
            shutil.rmtree(pod.folder, ignore_errors=True)


_LEASES: Final = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"


async def _main(kubeconfig: str, options: Mapping[str, Any]) -> None:
    client = KubernetesClient(KubernetesAccess.discover(kubeconfig))
    # No keep-alive: a probe on a half-closed connection would fail for no reason.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as http:
        node = _Node(client, http, options)
        work = asyncio.ensure_future(node.run())
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, work.cancel)
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await work
        finally:
            await client.close()


@click.command()
@click.option("--kubeconfig", required=True)
@click.argument("options", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(kubeconfig: str, options: Path) -> None:
    """Run the node that the file OPTIONS describes, until SIGTERM."""
    asyncio.run(_main(kubeconfig, loads(options.read_text())))


if __name__ == "__main__":
    main()

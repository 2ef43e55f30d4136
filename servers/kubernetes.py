"""A real Kubernetes control plane on this machine, without containers.

etcd, kube-apiserver, kube-controller-manager and kube-scheduler, each in its own process, with
certificates and RBAC; aggregated API servers (`add_api`); and KWOK, whose nodes only pretend to
run their pods. Pods that really run need `servers.kubelet.__main__`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import aiohttp

from nomad_watchdog.clients.kubernetes import KubernetesAccess, KubernetesClient
from nomad_watchdog.demo.process import Process, Running, clean_environment, free_port
from nomad_watchdog.errors import ConflictError, TerminalError, TransientError, WatchdogError
from servers.binaries import find
from servers.certificates import Authority

log = logging.getLogger(__name__)

PROGRAMS: Final = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")
STAGES: Final = Path(__file__).with_name("_kwok_stages.yaml")
FAKE: Final = "kwok.x-k8s.io/node"
_API_SERVICES: Final = "/apis/apiregistration.k8s.io/v1/apiservices"
_SERVICES: Final = "/api/v1/namespaces/kube-system/services"
_POLL_S: Final = 0.05
_CALL_S: Final = 2.0
_QPS: Final = ("--kube-api-qps=500", "--kube-api-burst=1000")
_ADMIN: Final = "/O=system:masters/CN=admin"
_FRONT: Final = "front-proxy"
"""The API server's identity to aggregated API servers, which then trust the caller's name in its requests."""


class KubernetesCluster(Running):
    """``async with KubernetesCluster(folder) as cluster: … cluster.kubeconfig``.

    `fake_nodes`: number of KWOK nodes, tainted so that only pods with a toleration are placed there.
    `lost_after_s`: seconds of silence after which a node counts as lost (Kubernetes' default is 50 s).
    `controllers`: if false, only etcd and the API server run, so objects have no effect. Ports stay the same across
    `stop_process` and `start_process`.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        fake_nodes: int = 0,
        lost_after_s: int = 6,
        controllers: bool = True,
    ) -> None:
        self.data_dir = data_dir.resolve()
        self.port = free_port()
        self.server = f"https://127.0.0.1:{self.port}"
        self.kubeconfig = self.data_dir / "admin.kubeconfig"
        self._authority = Authority(self.data_dir / "pki")
        self._fake_nodes = fake_nodes
        self._lost_after_s = lost_after_s
        self._controllers = controllers
        self._ports = {name: free_port() for name in ("etcd", "peer", "manager", "scheduler")}
        self._processes: dict[str, Process] = {}

    def settings(self, kubeconfig: Path | None = None) -> KubernetesAccess:
        """Access settings of the administrator, or of another user's kubeconfig."""
        return KubernetesAccess.discover(str(kubeconfig or self.kubeconfig))

    def client(self) -> KubernetesClient:
        """A client for the administrator; the caller must close it."""
        return KubernetesClient(self.settings())

    def names(self) -> list[str]:
        """The processes, in start order."""
        chosen = PROGRAMS if self._controllers else PROGRAMS[:2]
        return [*chosen, "kwok"] if self._fake_nodes else [*chosen]

    def pid(self, name: str) -> int:
        return self._running(name).pid

    def log_file(self, name: str) -> Path:
        return self.data_dir / f"{name}.log"

    async def start(self, timeout_s: float = 90.0) -> None:
        """Start everything and wait until it is ready. Raises TerminalError with the end of a log."""
        for name in self.names():
            await asyncio.to_thread(find, name)
        await self._make_files()
        for name in self.names():
            await self.start_process(name, timeout_s)
        if self._fake_nodes:
            await self.add_fake_nodes(self._fake_nodes)
        if self._controllers:
            await self.add_namespace("default", timeout_s)

    async def stop(self) -> None:
        """Stop the processes in reverse order. Idempotent."""
        for name in reversed(list(self._processes)):
            await self.stop_process(name)

    async def start_process(self, name: str, timeout_s: float = 60.0) -> None:
        """Start one process and wait until it responds."""
        known = self._processes.get(name)
        if known is not None and known.returncode is None:
            return
        program = await asyncio.to_thread(find, name)
        argv = [str(program), *self._arguments(name)]
        process = Process.start(argv, log=self.log_file(name), env=clean_environment())
        self._processes[name] = process
        await self._wait_ready(name, process, time.monotonic() + timeout_s)

    async def stop_process(self, name: str, grace_s: float = 5.0) -> None:
        process = self._processes.pop(name, None)
        if process is not None:
            await process.terminate(grace_s)

    async def kill_process(self, name: str) -> None:
        """Send SIGKILL, like a crash."""
        await self._running(name).kill()

    def pause_process(self, name: str) -> None:
        """Send SIGSTOP: connections stay open, and nothing is answered."""
        self._running(name).send(signal.SIGSTOP)

    def resume_process(self, name: str) -> None:
        self._running(name).send(signal.SIGCONT)

    async def user(self, name: str, groups: Sequence[str] = (), namespace: str = "") -> Path:
        """Create a kubeconfig for a user with only the permissions that RBAC grants."""
        subject = "".join(f"/O={group}" for group in groups) + f"/CN={name}"
        file = name.replace(":", "-")
        cert, key = await self._authority.issue(file, subject)
        return self._kubeconfig(file, cert, key, namespace)

    async def add_namespace(self, name: str, timeout_s: float = 30.0) -> None:
        """Create a namespace, and wait for its service account, without which its pods are not admitted."""
        client = self.client()
        deadline = time.monotonic() + timeout_s
        try:
            if name != "default":
                with contextlib.suppress(ConflictError):
                    await client.create("/api/v1/namespaces", _named("Namespace", name))
            path = f"/api/v1/namespaces/{name}/serviceaccounts/default"
            while self._controllers and await client.find(path) is None:
                if time.monotonic() > deadline:
                    raise TerminalError(f"namespace {name} got no service account in time")
                await asyncio.sleep(_POLL_S)
        finally:
            await client.close()

    async def add_api(self, group: str, version: str, port: int) -> tuple[Path, Path]:
        """Make the API server forward requests for an API group to https://localhost:`port`.

        Returns the certificate and key that this port must use. See `until_served`."""
        name = group.replace(".", "-")
        service = _named("Service", name)
        service["spec"] = {"type": "ExternalName", "externalName": "localhost"}
        host = f"{name}.kube-system.svc"
        cert, key = await self._authority.issue(name, f"/CN={host}", san=f"DNS:{host}")
        entry = _named("APIService", f"{version}.{group}")
        entry["apiVersion"] = "apiregistration.k8s.io/v1"
        entry["spec"] = {
            "group": group,
            "version": version,
            "service": {"namespace": "kube-system", "name": name, "port": port},
            "caBundle": _packed(self._authority.cert),
            "groupPriorityMinimum": 100,
            "versionPriority": 100,
        }
        client = self.client()
        try:
            await client.create(_SERVICES, service)
            await client.create(_API_SERVICES, entry)
        finally:
            await client.close()
        return cert, key

    async def remove_api(self, group: str, version: str) -> None:
        """Undo `add_api`: an API without its server prevents namespaces from being deleted. Idempotent."""
        client = self.client()
        try:
            await client.delete(f"{_API_SERVICES}/{version}.{group}")
            await client.delete(f"{_SERVICES}/{group.replace('.', '-')}")
        finally:
            await client.close()

    async def until_served(
        self, group: str, version: str, timeout_s: float = 60.0, server: Process | None = None
    ) -> None:
        """Wait until the API server can reach the server of an added API. Raises TerminalError with its reason
        and the end of the server's log."""
        client = self.client()
        deadline = time.monotonic() + timeout_s
        try:
            while True:
                states: list[dict[str, Any]] = []
                with contextlib.suppress(TransientError):
                    found = await client.get(f"{_API_SERVICES}/{version}.{group}")
                    states = (found.get("status") or {}).get("conditions") or []
                if any((one["type"], one["status"]) == ("Available", "True") for one in states):
                    return
                ended = server is not None and server.returncode is not None
                if ended or time.monotonic() > deadline:
                    said = [one.get("message", "") for one in states]
                    tail = server.log_tail() if server is not None else ""
                    raise TerminalError(f"{version}.{group} is not served in time: {said}\n{tail}")
                await asyncio.sleep(_POLL_S)
        finally:
            await client.close()

    async def add_fake_nodes(self, count: int, pods: int = 5_000) -> None:
        """Add KWOK nodes, each with room for `pods` pods."""
        client = self.client()
        room = {"cpu": "10000", "memory": "10000Gi", "pods": str(pods)}
        try:
            for number in range(count):
                node = _named("Node", f"fake-{number}")
                node["metadata"] |= {"annotations": {FAKE: "fake"}, "labels": {FAKE: "fake"}}
                node["spec"] = {"taints": [{"key": FAKE, "value": "fake", "effect": "NoSchedule"}]}
                node["status"] = {"capacity": room, "allocatable": room}
                with contextlib.suppress(ConflictError):
                    await client.create("/api/v1/nodes", node)
        finally:
            await client.close()

    def _running(self, name: str) -> Process:
        if name not in self._processes:
            raise TerminalError(f"{name} was not started")
        return self._processes[name]

    async def _make_files(self) -> None:
        self.data_dir.mkdir(parents=True, exist_ok=True)
        issue = self._authority.issue
        await self._authority.make()
        san = "IP:127.0.0.1,IP:10.96.0.1,DNS:localhost,DNS:kubernetes.default.svc"
        await issue("server", "/CN=kube-apiserver", san=san)
        await self._authority.rsa_key("accounts")
        self._kubeconfig("admin", *await issue("admin", _ADMIN))
        await issue(_FRONT, f"/CN={_FRONT}")
        for name in ("kube-controller-manager", "kube-scheduler"):
            self._kubeconfig(name, *await issue(name, f"/CN=system:{name}"))

    def _kubeconfig(self, name: str, cert: Path, key: Path, namespace: str = "") -> Path:
        context = {"cluster": "dev", "user": name} | ({"namespace": namespace} if namespace else {})
        cluster = {
            "server": self.server,
            "certificate-authority-data": _packed(self._authority.cert),
        }
        user = {"client-certificate-data": _packed(cert), "client-key-data": _packed(key)}
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "dev",
            "clusters": [{"name": "dev", "cluster": cluster}],
            "users": [{"name": name, "user": user}],
            "contexts": [{"name": "dev", "context": context}],
        }
        path = self.data_dir / f"{name}.kubeconfig"
        path.touch(mode=0o600)
        path.write_text(json.dumps(document, indent=1))  # JSON is YAML
        return path

    def _arguments(self, name: str) -> list[str]:
        ports, pki = self._ports, self._authority.folder
        etcd = f"http://127.0.0.1:{ports['etcd']}"
        peer = f"http://127.0.0.1:{ports['peer']}"
        own = f"--kubeconfig={self.data_dir / name}.kubeconfig"
        alone = ("--leader-elect=false", "--bind-address=127.0.0.1")
        if name == "etcd":
            return [
                f"--data-dir={self.data_dir / 'etcd'}", "--unsafe-no-fsync", "--log-level=warn",
                f"--listen-client-urls={etcd}", f"--advertise-client-urls={etcd}",
                f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}",
                f"--initial-cluster=default={peer}",
            ]  # fmt: skip
        if name == "kube-apiserver":
            return [
                f"--etcd-servers={etcd}", "--authorization-mode=RBAC", "--profiling=false",
                "--bind-address=127.0.0.1", "--advertise-address=127.0.0.1",
                f"--secure-port={self.port}", f"--client-ca-file={self._authority.cert}",
                f"--tls-cert-file={pki / 'server.crt'}", f"--tls-private-key-file={pki / 'server.key'}",
                "--service-account-issuer=https://kubernetes.default.svc",
                f"--service-account-key-file={pki / 'accounts.key'}",
                f"--service-account-signing-key-file={pki / 'accounts.key'}",
                "--service-cluster-ip-range=10.96.0.0/16",
                f"--proxy-client-cert-file={pki / _FRONT}.crt",
                f"--proxy-client-key-file={pki / _FRONT}.key",
                f"--requestheader-client-ca-file={self._authority.cert}",
                f"--requestheader-allowed-names={_FRONT}",
                "--requestheader-username-headers=X-Remote-User",
                "--requestheader-group-headers=X-Remote-Group",
                "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            ]  # fmt: skip
        if name == "kube-controller-manager":
            return [
                own, *alone, *_QPS, f"--secure-port={ports['manager']}",
                f"--service-account-private-key-file={pki / 'accounts.key'}",
                f"--root-ca-file={self._authority.cert}",
                f"--node-monitor-grace-period={self._lost_after_s}s", "--node-monitor-period=1s",
                "--use-service-account-credentials=true",
                "--concurrent-deployment-syncs=20", "--concurrent-replicaset-syncs=20",
                "--concurrent-statefulset-syncs=20", "--horizontal-pod-autoscaler-sync-period=1s",
                # CPU use in a pod's first minutes counts too, so that tests need not wait five minutes.
                "--horizontal-pod-autoscaler-initial-readiness-delay=1s",
                "--horizontal-pod-autoscaler-cpu-initialization-period=1s",
            ]  # fmt: skip
        if name == "kube-scheduler":
            return [own, *alone, *_QPS, f"--secure-port={ports['scheduler']}"]
        return [
            f"--kubeconfig={self.kubeconfig}", f"--config={STAGES}", "--manage-all-nodes=false",
            f"--manage-nodes-with-annotation-selector={FAKE}=fake", "--node-ip=127.0.0.1",
        ]  # fmt: skip

    async def _wait_ready(self, name: str, process: Process, deadline: float) -> None:
        timeout = aiohttp.ClientTimeout(total=_CALL_S)
        async with aiohttp.ClientSession(timeout=timeout) as http:
            while not await self._is_ready(name, http):
                late = time.monotonic() > deadline
                if late or process.returncode is not None:
                    why = "is not ready in time" if late else f"ended with {process.returncode}"
                    raise TerminalError(
                        f"{name} {why}; its log {process.log} ends:\n{process.log_tail()}"
                    )
                await asyncio.sleep(_POLL_S)

    async def _is_ready(self, name: str, http: aiohttp.ClientSession) -> bool:
        if name == "kwok":
            return True
        if name == "kube-apiserver":
            client = self.client()
            try:
                return (await client.text("/readyz")) == "ok"
            except WatchdogError:
                return False
            finally:
                await client.close()
        place = {"etcd": "etcd", "kube-controller-manager": "manager"}.get(name, "scheduler")
        url = f"{'http' if name == 'etcd' else 'https'}://127.0.0.1:{self._ports[place]}"
        path = "/health" if name == "etcd" else "/healthz"
        try:
            # The server uses a self-signed certificate.
            async with http.get(url + path, ssl=False) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, OSError):
            return False


def _packed(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _named(kind: str, name: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": kind, "metadata": {"name": name}}

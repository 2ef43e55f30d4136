"""Test helpers for the control plane as a Deployment in the cluster that it manages."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import watchdog_agent

from nomad_watchdog.clients.kubernetes import KubernetesClient
from nomad_watchdog.demo.listener import DeviceListener
from nomad_watchdog.demo.process import free_port
from nomad_watchdog.errors import WatchdogError
from servers.kubelet.__main__ import Kubelet
from servers.kubelet.spec import Image
from tests.forwarding import forward

TOKEN = "operators-s3cret-token"
CONFIG = """\
backend = "kubernetes"
shards  = 8
consul {
  address = "CONSUL"
}
agent_class "default" {
  beat = "1s"
  probe "http" {
    port     = PORT
    interval = "1s"
    timeout  = "500ms"
  }
}
"""
ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
SOURCES = str(Path(watchdog_agent.__file__).parents[1])
IMAGES = {
    "agntup/nomad-watchdog": Image(
        (sys.executable, "-m", "nomad_watchdog"), {"PYTHONDONTWRITEBYTECODE": "1"}
    ),
    "agntup/watchdog-agent": Image(
        (sys.executable, "-P", "-S", "-m", "watchdog_agent"),
        {"PYTHONPATH": SOURCES, "PYTHONDONTWRITEBYTECODE": "1"},
    ),
}
PLURALS = {
    "Namespace": ("/api/v1", "namespaces"),
    "ServiceAccount": ("/api/v1", "serviceaccounts"),
    "ConfigMap": ("/api/v1", "configmaps"),
    "Service": ("/api/v1", "services"),
    "Secret": ("/api/v1", "secrets"),
    "Role": ("/apis/rbac.authorization.k8s.io/v1", "roles"),
    "ClusterRole": ("/apis/rbac.authorization.k8s.io/v1", "clusterroles"),
    "ClusterRoleBinding": ("/apis/rbac.authorization.k8s.io/v1", "clusterrolebindings"),
    "RoleBinding": ("/apis/rbac.authorization.k8s.io/v1", "rolebindings"),
    "PodDisruptionBudget": ("/apis/policy/v1", "poddisruptionbudgets"),
    "NetworkPolicy": ("/apis/networking.k8s.io/v1", "networkpolicies"),
    "Deployment": ("/apis/apps/v1", "deployments"),
    "Job": ("/apis/batch/v1", "jobs"),
}


def path_of(thing: dict[str, Any]) -> str:
    """The path of an object in the API."""
    group, plural = PLURALS[thing["kind"]]
    meta = thing["metadata"]
    below = f"/namespaces/{meta['namespace']}" if "namespace" in meta else ""
    return f"{group}{below}/{plural}/{meta['name']}"


async def until(test: Callable[[], Awaitable[Any]], what: str, timeout_s: float = 60.0) -> Any:
    """The first true value of the test; raises AssertionError with the last value on timeout."""
    last: Any = None
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    if last := await test():
                        return last
                except (aiohttp.ClientError, OSError) as error:
                    last = error
                await asyncio.sleep(0.2)
    except TimeoutError:
        raise AssertionError(f"{what}: {last!r}") from None


def secret_of(namespace: str) -> dict[str, Any]:
    """The Secret that the user has to provide."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "nomad-watchdog-api", "namespace": namespace},
        "stringData": {"token": TOKEN, "agent-key": "k" * 40},
    }


async def pods_of(client: KubernetesClient, namespace: str, name: str) -> list[dict[str, Any]]:
    labels = f"app.kubernetes.io/name={name}"
    return (await client.list(f"/api/v1/namespaces/{namespace}/pods", labels=labels)).items


async def agents_of(client: KubernetesClient, node: Kubelet, *namespaces: str) -> set[int]:
    """Pids of the agent processes."""
    found = [one for space in namespaces for one in await pods_of(client, space, "watchdog-agent")]
    return {pid for one in found for pid in node.processes(one["metadata"]["uid"])}


@asynccontextmanager
async def cleaned(client: KubernetesClient, *namespaces: str) -> AsyncIterator[None]:
    """On exit, delete every Deployment, Job and pod in these namespaces, the control plane's
    first."""
    try:
        yield
    finally:
        for namespace in namespaces:
            paths = [
                f"/apis/{group}/namespaces/{namespace}/{plural}"
                for group, plural in (("apps/v1", "deployments"), ("batch/v1", "jobs"))
            ]

            async def empty(paths: list[str] = paths, namespace: str = namespace) -> bool:
                found = [
                    f"{path}/{one['metadata']['name']}"
                    for path in paths
                    for one in (await client.list(path)).items
                ]
                # the owner of other objects goes first
                for path in sorted(found, key=lambda path: not path.endswith("/nomad-watchdog")):
                    await client.delete(path, propagation="Background")
                pods = await client.list(f"/api/v1/namespaces/{namespace}/pods")
                return not found and not pods.items

            await until(empty, f"the end of the pods in {namespace}")


async def apply(client: KubernetesClient, things: Sequence[dict[str, Any]], **params: str) -> Any:
    """Apply like `kubectl apply --server-side`, with strict validation; returns the last answer."""
    answer: Any = None
    for thing in things:
        answer = await client.call(
            "PATCH", path_of(thing), body=thing, content="application/apply-patch+yaml",
            params={"fieldManager": "test", "force": "true", "fieldValidation": "Strict", **params},
        )  # fmt: skip
    return answer


def with_environment(deployment: dict[str, Any], env: dict[str, str]) -> None:
    """Set or replace these variables of the only container, in place."""
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    kept = [one for one in container["env"] if one["name"] not in env]
    container["env"] = kept + [{"name": name, "value": value} for name, value in env.items()]


def is_ready(pod: dict[str, Any]) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or []
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


class ServiceProxy:
    """Replaces DNS and kube-proxy for one Service: connections to `address` go to a ready pod that
    its selector matches. (EndpointSlices take no loopback addresses, which the pods have here.)"""

    def __init__(
        self, client: KubernetesClient, namespace: str, service: str, *, scheme: str = "http"
    ) -> None:
        self._listener = DeviceListener(self._answer, "127.0.0.1", free_port())
        self.address = f"{scheme}://127.0.0.1:{self._listener.port}"
        self._client, self._namespace, self._service = client, namespace, service
        self._pods: list[tuple[str, int]] = []

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[None]:
        following = asyncio.ensure_future(self._follow())
        await self._listener.start()
        try:
            yield
        finally:
            await self._listener.stop()
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

    async def _follow(self) -> None:
        space = f"/api/v1/namespaces/{self._namespace}"
        while True:
            with suppress(WatchdogError):
                service = await self._client.find(f"{space}/services/{self._service}")
                spec = (service or {}).get("spec") or {}
                labels = ",".join(f"{k}={v}" for k, v in (spec.get("selector") or {}).items())
                pods = (
                    (await self._client.list(f"{space}/pods", labels=labels)).items
                    if labels
                    else []
                )
                self._pods = [
                    (pod["status"]["podIP"], port["containerPort"])
                    for pod in pods if is_ready(pod)
                    for one in pod["spec"]["containers"] for port in one.get("ports") or []
                    if port.get("name") == spec["ports"][0]["targetPort"]
                ]  # fmt: skip
            await asyncio.sleep(0.2)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._pods:
            await forward(reader, writer, *random.choice(self._pods))

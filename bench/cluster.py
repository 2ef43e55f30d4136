"""Shared parts of the Kubernetes benchmarks: namespaces, settings, and a bare loop of applies.

A namespace has at most 2,000 devices, as in production.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from bench.plane import FLEET
from nomad_watchdog.clients.kubernetes import KubernetesClient
from nomad_watchdog.clients.kubernetes_objects import KubernetesObject
from nomad_watchdog.config.load import load
from nomad_watchdog.config.settings import Settings
from nomad_watchdog.model import Epoch
from nomad_watchdog.schedulers.kubernetes import names, objects
from nomad_watchdog.testing.conformance import record_of
from servers.kubernetes import KubernetesCluster

TEMPLATE = Path(__file__).with_name("mock.kubernetes.yaml")
CONFIG = """\
backend  = "kubernetes"
data_dir = "{root}/{namespace}"
kubernetes {{
  kubeconfig = "{kubeconfig}"
  namespace  = "{namespace}"
  namespaces = {spread}
}}
"""
PER_NAMESPACE = 2000


def spaces(first: str, count: int) -> list[str]:
    """The namespaces for this number of devices."""
    return [names.namespace_of(first, n) for n in range(-(-count // PER_NAMESPACE))]


async def add_namespaces(cluster: KubernetesCluster, count: int) -> None:
    for first in ("before", "ours", "after"):
        for space in spaces(first, count):
            await cluster.add_namespace(space)


def settings(
    cluster: KubernetesCluster, root: Path, namespace: str, count: int
) -> tuple[Settings, Path]:
    """Settings as a user would write them, and their file."""
    (root / namespace).mkdir(parents=True, exist_ok=True)
    file = root / f"{namespace}.hcl"
    file.write_text(
        (CONFIG + FLEET).format(
            root=root,
            namespace=namespace,
            spread=len(spaces(namespace, count)),
            kubeconfig=cluster.kubeconfig,
            template=TEMPLATE,
        )
    )
    return load(file, {}), file


def bodies(chosen: Settings, count: int) -> list[KubernetesObject]:
    """The objects that ours would apply, built before the measurement starts."""
    spec = chosen.specs()["default"]
    built = objects.build(spec)
    found = []
    for number in range(count):
        record = record_of(f"bare-{number}")
        labels = objects.labels_of(
            record, Epoch(1), spec, kind=built.kind, shard=0, installation="bare"
        )
        document, _ = objects.document_of(record, Epoch(1), spec)
        found.append(
            objects.workload(built, record, spec, labels=labels, document=document, secret="")
        )
    return found


async def bare_loop(
    client: KubernetesClient, first: str, things: list[KubernetesObject], at_once: int
) -> float:
    """Seconds for these applies, `at_once` concurrently, spread over the namespaces."""
    paths = [names.collection(space, "deployment") for space in spaces(first, len(things))]
    rest = iter(enumerate(things))

    async def worker() -> None:
        for number, thing in rest:
            await client.apply(f"{paths[number % len(paths)]}/{thing['metadata']['name']}", thing)

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(at_once)))
    return time.perf_counter() - began

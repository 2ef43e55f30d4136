"""Objects of the Kubernetes API, as far as this project reads them.

A key may be missing, and a list or mapping may be null, so readers use ``get(...) or ...``.
(https://kubernetes.io/docs/reference/kubernetes-api/)
"""

from __future__ import annotations

from typing import Required, TypedDict


class OwnerReference(TypedDict):
    apiVersion: str
    kind: str
    name: str
    uid: str


class ObjectMeta(TypedDict, total=False):
    annotations: dict[str, str] | None
    creationTimestamp: str
    deletionTimestamp: str
    labels: dict[str, str] | None
    name: str
    namespace: str
    ownerReferences: list[OwnerReference]
    resourceVersion: str
    uid: str


class ObjectCondition(TypedDict, total=False):
    type: Required[str]
    status: Required[str]
    reason: str
    message: str


class Waiting(TypedDict, total=False):
    reason: str
    message: str


class Terminated(TypedDict, total=False):
    reason: str
    exitCode: int


class ContainerState(TypedDict, total=False):
    running: dict[str, object]
    terminated: Terminated
    waiting: Waiting


class ContainerStatus(TypedDict, total=False):
    lastState: ContainerState | None
    restartCount: int
    state: ContainerState | None


class EnvVar(TypedDict, total=False):
    name: str
    value: str


class Container(TypedDict, total=False):
    name: str
    image: str
    env: list[EnvVar] | None
    readinessProbe: dict[str, object]
    volumeMounts: list[dict[str, object]] | None


class Toleration(TypedDict, total=False):
    key: str


class NodeAffinity(TypedDict, total=False):
    preferredDuringSchedulingIgnoredDuringExecution: list[dict[str, object]] | None


class Affinity(TypedDict, total=False):
    nodeAffinity: NodeAffinity | None


class Taint(TypedDict, total=False):
    key: str
    effect: str


class PodSpec(TypedDict, total=False):
    affinity: Affinity | None
    containers: list[Container] | None
    nodeName: str
    nodeSelector: dict[str, str] | None
    readinessGates: list[dict[str, str]] | None
    restartPolicy: str
    tolerations: list[Toleration] | None
    volumes: list[dict[str, object]] | None


class PodTemplate(TypedDict, total=False):
    metadata: ObjectMeta | None
    spec: PodSpec


class DeploymentStrategy(TypedDict, total=False):
    type: str


class WorkloadSpec(PodSpec, total=False):
    """Spec of a Pod or a Node, or of a Deployment or StatefulSet."""

    podManagementPolicy: str
    replicas: int
    revisionHistoryLimit: int
    selector: dict[str, dict[str, str]]
    serviceName: str
    strategy: DeploymentStrategy | None
    taints: list[Taint] | None
    template: PodTemplate | None
    unschedulable: bool


class ObjectStatus(TypedDict, total=False):
    conditions: list[ObjectCondition] | None
    containerStatuses: list[ContainerStatus] | None
    message: str
    capacity: dict[str, str] | None
    phase: str
    readyReplicas: int
    reason: str


class KubernetesObject(TypedDict, total=False):
    """A Pod, Deployment, StatefulSet, ConfigMap, Secret or Node, or only its metadata."""

    apiVersion: str
    kind: str
    metadata: Required[ObjectMeta]
    data: dict[str, str] | None
    type: str
    spec: WorkloadSpec
    status: ObjectStatus | None


class ContainerUsage(TypedDict, total=False):
    usage: dict[str, str]


class NodeMetrics(TypedDict, total=False):
    """A node of the metrics API (metrics.k8s.io)."""

    metadata: Required[ObjectMeta]
    usage: dict[str, str]


class PodMetrics(TypedDict, total=False):
    """A pod of the metrics API (metrics.k8s.io)."""

    metadata: ObjectMeta
    containers: list[ContainerUsage]

"""The state of one pod, with its reason. Pure: values in, values out.

The phase of a pod is not enough: it is Running while the container crash-loops, while the node does not answer
and while the pod is being stopped. So the state is determined from times, conditions and container states.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from nomad_watchdog.clients.kubernetes_objects import (
    ContainerStatus,
    KubernetesObject,
    ObjectCondition,
    Terminated,
    Waiting,
)
from nomad_watchdog.model import PlacementState, WallTime

OVERDUE_S: Final = 5.0
"""A pod that exists for this time after its grace period is on a node that does not answer."""
_FAULTS: Final = frozenset(
    {
        "CrashLoopBackOff",
        "ErrImagePull",
        "ImagePullBackOff",
        "InvalidImageName",
        "ErrImageNeverPull",
        "CreateContainerConfigError",
        "CreateContainerError",
        "RunContainerError",
    }
)
_IMAGE: Final = frozenset(
    {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"}
)
ENDED: Final = frozenset({"Succeeded", "Failed"})


def pod_state(pod: KubernetesObject) -> tuple[PlacementState, str]:
    """State and reason of a pod that has not ended and is not being stopped."""
    scheduled = condition(pod, "PodScheduled")
    if scheduled is not None and scheduled["status"] == "False":
        return PlacementState.PENDING, f"no node can run it: {scheduled.get('message', '')}"[:300]
    if not node_of(pod):
        return PlacementState.PENDING, "waiting for the scheduler"
    if _is_cut_off(pod):
        return PlacementState.LOST, lost_reason(pod)
    for status in _container_statuses(pod):
        if found := _container_state(status):
            return found
    if phase(pod) == "Running":
        return PlacementState.RUNNING, ""
    return PlacementState.STARTING, ""


def _container_state(status: ContainerStatus) -> tuple[PlacementState, str] | None:
    """State and reason of a container that does not run; None for one that runs."""
    state = status.get("state") or {}
    waiting: Waiting = state.get("waiting") or {}
    reason = waiting.get("reason", "")
    if reason in _IMAGE:
        return PlacementState.STARTING, f"{reason}: {waiting.get('message', '')}"[:300]
    if reason in _FAULTS:
        return PlacementState.RESTARTING, _fault(status, waiting)
    if "terminated" in state:
        return PlacementState.RESTARTING, _exit(state["terminated"])
    if "running" in state:
        return None
    started_before = status.get("restartCount")
    return (
        PlacementState.RESTARTING if started_before else PlacementState.STARTING,
        waiting.get("message") or reason,
    )


def is_lost(pod: KubernetesObject, now: WallTime) -> bool:
    """Whether the node of a pod does not answer, so that the process of the pod may still run."""
    if not node_of(pod):
        return False
    overdue = time_of(pod["metadata"].get("deletionTimestamp"))
    return _is_cut_off(pod) or bool(overdue and now - overdue > OVERDUE_S)


def is_unschedulable(pod: KubernetesObject) -> bool:
    scheduled = condition(pod, "PodScheduled")
    return (
        scheduled is not None
        and scheduled["status"] == "False"
        and scheduled.get("reason") == "Unschedulable"
    )


def confirms_pod(kind: str, pod: KubernetesObject) -> bool:
    """Whether an event only confirms a requested start: the pod is created, placed or runs."""
    if kind == "DELETED" or is_leaving(pod) or phase(pod) in ENDED:
        return False
    scheduled = condition(pod, "PodScheduled")
    if scheduled is not None and scheduled["status"] == "False":
        return True  # a pod without a node needs no action either
    return pod_state(pod)[0] in {
        PlacementState.PENDING,
        PlacementState.STARTING,
        PlacementState.RUNNING,
    } and not restarts_of(pod)


def _is_cut_off(pod: KubernetesObject) -> bool:
    """Whether the kubelet last reported ready containers, but the node controller has marked the pod as not ready.
    It marks the pods of a node that has stopped reporting in this way."""
    if (pod.get("spec") or {}).get("readinessGates"):
        return False  # another controller may have marked a healthy pod as not ready
    ready, containers = condition(pod, "Ready"), condition(pod, "ContainersReady")
    if ready is None or containers is None:
        return False
    return ready["status"] == "False" and containers["status"] == "True"


def lost_reason(pod: KubernetesObject) -> str:
    return f"node {node_of(pod)} does not answer; its process may still run"


def leaving_reason(pod: KubernetesObject) -> str:
    moved = condition(pod, "DisruptionTarget")
    if moved is not None and moved["status"] == "True":
        return f"is being moved: {moved.get('message') or moved.get('reason', '')}"[:300]
    return "stop requested"


def ending(pod: KubernetesObject) -> str:
    """Why a pod has ended."""
    status = pod.get("status") or {}
    if status.get("reason") or status.get("message"):
        return f"{status.get('reason', '')}: {status.get('message', '')}".strip(": ")[:300]
    for one in _container_statuses(pod):
        if done := (one.get("state") or {}).get("terminated"):
            return _exit(done)
    return f"the pod has ended ({phase(pod)})"


def _exit(done: Terminated) -> str:
    reason, code = done.get("reason", ""), done.get("exitCode", "?")
    if reason == "OOMKilled":
        return f"OOMKilled: it used more memory than its limit (exit code {code})"
    return f"exit code {code}" + (f" ({reason})" if reason and reason != "Error" else "")


def _fault(status: ContainerStatus, waiting: Waiting) -> str:
    last = (status.get("lastState") or {}).get("terminated")
    reason = f"{waiting['reason']}: {waiting.get('message', '')}".strip(": ")
    return (f"{_exit(last)}; {reason}" if last else reason)[:300]


def time_of(text: str | None) -> float:
    """Unix seconds of a timestamp; 0 if there is none or it is not valid."""
    try:
        return datetime.fromisoformat(text).timestamp() if text else 0.0
    except ValueError:
        return 0.0


def condition(thing: KubernetesObject, kind: str) -> ObjectCondition | None:
    conditions = (thing.get("status") or {}).get("conditions") or []
    return next((one for one in conditions if one["type"] == kind), None)


def _container_statuses(pod: KubernetesObject) -> Sequence[ContainerStatus]:
    return (pod.get("status") or {}).get("containerStatuses") or []


def node_of(pod: KubernetesObject) -> str:
    """Name of the node of a pod; "" if it has none yet."""
    return (pod.get("spec") or {}).get("nodeName", "")


def phase(pod: KubernetesObject) -> str:
    return (pod.get("status") or {}).get("phase", "Pending")


def is_leaving(thing: KubernetesObject) -> bool:
    return bool(thing["metadata"].get("deletionTimestamp"))


def created_at(thing: KubernetesObject) -> float:
    return time_of(thing["metadata"].get("creationTimestamp"))


def is_ready(pod: KubernetesObject) -> bool | None:
    """Result of the readiness probe; None for a pod without one, which is ready at once."""
    probed = [one for one in pod["spec"].get("containers") or [] if one.get("readinessProbe")]
    ready = condition(pod, "Ready")
    return ready is not None and ready["status"] == "True" if probed else None


def restarts_of(pod: KubernetesObject) -> int:
    return sum(one.get("restartCount", 0) for one in _container_statuses(pod))

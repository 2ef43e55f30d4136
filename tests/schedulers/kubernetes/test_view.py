"""What pods and objects mean; each case has been seen on the real API server."""

from __future__ import annotations

from typing import Any

import pytest

from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.model import Placement, PlacementState, WallTime
from nomad_watchdog.schedulers.kubernetes import _pods, names
from nomad_watchdog.schedulers.kubernetes import _view as view

DEVICE = DeviceId("device-1")
SLUG = slug_of(DEVICE)
NOW = WallTime(1_000_000_000.0)  # 2001-09-09T01:46:40Z
BORN = "2001-09-09T01:46:00Z"
READY = [
    {"type": "PodScheduled", "status": "True"},
    {"type": "ContainersReady", "status": "True"},
    {"type": "Ready", "status": "True"},
]


def meta(epoch: int = 1, kind: str = "deployment", **more: Any) -> dict[str, Any]:
    return {
        "name": names.name_of(SLUG),
        "namespace": "n",
        "uid": f"uid-{epoch}",
        "creationTimestamp": BORN,
        "labels": {names.SLUG: SLUG, names.EPOCH: str(epoch), names.WORKLOAD: kind},
        "annotations": {names.DEVICE_ID: DEVICE, names.SPEC_HASH: "h"},
        **more,
    }


def owner(epoch: int = 1, **more: Any) -> dict[str, Any]:
    return {"metadata": meta(epoch, **more)}


def pod(
    epoch: int = 1,
    *,
    phase: str = "Running",
    conditions: list[Any] | None = None,
    state: Any = None,
    last: Any = None,
    restarts: int = 0,
    node: str = "node-1",
    status: Any = None,
    **more: Any,
) -> dict[str, Any]:
    container = {
        "state": state or {"running": {}},
        "lastState": last or {},
        "restartCount": restarts,
    }
    return {
        "metadata": meta(epoch, **more),
        "spec": {"nodeName": node},
        "status": {
            "phase": phase,
            "conditions": READY if conditions is None else conditions,
            "containerStatuses": [container],
            **(status or {}),
        },
    }


def seen(objects: list[Any], pods: list[Any]) -> tuple[Placement, ...]:
    found = view.placements(objects, pods, NOW)
    return found.get(SLUG, ())


WAITING = "CrashLoopBackOff"
CASES: dict[str, tuple[Any, str, str]] = {
    "runs": (pod(), "running", ""),
    "no node can run it": (
        pod(phase="Pending", node="", conditions=[
            {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}
        ]),
        "pending", "no node can run it: 0/3 nodes",
    ),
    "not looked at yet": (pod(phase="Pending", node="", conditions=[]), "pending", "waiting for the scheduler"),
    "image is missing": (
        pod(phase="Pending", conditions=[], state={"waiting": {"reason": "ImagePullBackOff", "message": "x:1"}}),
        "starting", "ImagePullBackOff: x:1",
    ),
    "crash loop": (
        pod(state={"waiting": {"reason": WAITING}}, last={"terminated": {"exitCode": 1, "reason": "Error"}}, restarts=6),
        "restarting", "exit code 1; CrashLoopBackOff",
    ),
    "out of memory": (
        pod(state={"waiting": {"reason": WAITING}}, last={"terminated": {"exitCode": 137, "reason": "OOMKilled"}}),
        "restarting", "OOMKilled: it used more memory than its limit (exit code 137); CrashLoopBackOff",
    ),
    "between two runs": (
        pod(state={"terminated": {"exitCode": 143, "reason": "Error"}}), "restarting", "exit code 143",
    ),
    "a restarted one that runs": (pod(restarts=3), "running", ""),
    "evicted": (
        pod(phase="Failed", status={"reason": "Evicted", "message": "low on memory"}),
        "restarting", "Evicted: low on memory; its replacement is being started",
    ),
    "drained": (
        pod(deletionTimestamp="2001-09-09T01:46:45Z", conditions=[
            *READY, {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}
        ]),
        "restarting", "is being moved: EvictionByEvictionAPI",
    ),
    "node is silent": (
        pod(conditions=[{"type": "ContainersReady", "status": "True"}, {"type": "Ready", "status": "False"}]),
        "lost", "node node-1 does not answer; its process may still run",
    ),
    "overdue": (
        pod(deletionTimestamp="2001-09-09T01:46:30Z"), "lost",
        "node node-1 does not answer; its process may still run",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_pod_means(case: str) -> None:
    """A pod under its Deployment has this state with this reason."""
    thing, state, reason = CASES[case]
    (found,) = seen([owner()], [thing])

    assert (found.state, found.reason) == (state, reason)


def test_a_pod_waits_since_it_was_made_and_is_queued_without_a_node() -> None:
    """A pod without a node is queued; only a pod with a node can fail to be started by it."""
    (there,) = seen([owner()], [pod(state={"waiting": {"reason": "ContainerCreating"}})])
    (queued,) = seen([owner()], [pod(node="", state={"waiting": {}})])
    (unmade,) = seen([owner()], [])
    assert (there.state, there.queued) == (PlacementState.STARTING, False)
    assert there.waits_since == _pods.time_of(BORN)
    assert queued.queued
    assert unmade.queued


def test_a_deployment_without_a_pod_is_pending_and_says_why() -> None:
    """The object's conditions show a quota that rejects the pod, which becomes the reason."""
    broken = owner() | {
        "status": {
            "conditions": [
                {"type": "ReplicaFailure", "status": "True", "message": "exceeded quota"}
            ]
        }
    }

    assert [one.state for one in seen([owner()], [])] == [PlacementState.PENDING]
    assert seen([broken], [])[0].reason == "its pod cannot be created: exceeded quota"


def test_told_to_stop_is_stopping_until_the_object_is_gone() -> None:
    """A Deployment that is being deleted makes its placement STOPPING, with and without its pod."""
    going = owner(deletionTimestamp="2001-09-09T01:46:41Z")

    assert seen([going], [pod()])[0].state is PlacementState.STOPPING
    assert seen([going], [])[0].state is PlacementState.STOPPING
    assert seen([], [pod()])[0].state is PlacementState.STOPPING
    assert seen([], []) == ()


def test_in_place_the_old_epoch_stops_and_the_new_one_waits() -> None:
    """While a Deployment is at a new epoch and the old pod exists, there are two placements, one
    per process."""
    old, new = seen([owner(2)], [pod(1)])

    assert (old.epoch, old.state, old.instances) == (1, PlacementState.STOPPING, ("uid-1",))
    assert (new.epoch, new.state, new.instances) == (2, PlacementState.PENDING, ())
    assert old.ref != new.ref


def test_a_replaced_pod_gives_way_to_its_successor() -> None:
    """After a pod was moved, only the new one is an instance that may be accepted."""
    old = pod(deletionTimestamp="2001-09-09T01:46:30Z", uid="old")
    (found,) = seen([owner()], [old, pod(uid="new")])

    assert (found.state, found.instances) == (PlacementState.RUNNING, ("new",))


def test_a_bare_pod_that_has_ended_is_dead() -> None:
    """A bare pod is never restarted, so an evicted one is DEAD with its reason."""
    ended = pod(kind="pod", phase="Failed", status={"reason": "Evicted"})

    assert [(one.state, one.reason) for one in seen([], [ended])] == [
        (PlacementState.DEAD, "Evicted")
    ]


def test_a_pod_is_ready_by_its_own_probe_only() -> None:
    """Without a readiness probe Kubernetes reports every running pod as ready, which says nothing
    about its agent."""
    probed = pod()
    probed["spec"]["containers"] = [{"readinessProbe": {"periodSeconds": 5}}]
    unready = pod(conditions=[{"type": "Ready", "status": "False"}])
    unready["spec"]["containers"] = [{"readinessProbe": {"periodSeconds": 5}}]

    assert [seen([owner()], [one])[0].ready for one in (pod(), probed, unready)] == [
        None, True, False,
    ]  # fmt: skip


def test_labels_that_do_not_hold_together_are_counted_and_left_out() -> None:
    """An object whose slug does not match its device, or whose epoch is not a number, is not a
    placement (S11)."""
    wrong = owner()
    wrong["metadata"]["labels"][names.SLUG] = "other"
    strange = owner()
    strange["metadata"]["labels"][names.EPOCH] = "²"

    assert view.placements([wrong, strange], [], NOW) == {}


def test_only_news_that_confirms_is_calm() -> None:
    """A start that is created, placed or running is calm; an end, a stop, a restart or a crash is
    not."""
    calm = [pod(), pod(phase="Pending", node="", conditions=[]), CASES["no node can run it"][0]]
    urgent = [CASES[name][0] for name in ("crash loop", "evicted", "drained", "node is silent")]

    assert [_pods.confirms_pod("MODIFIED", one) for one in calm] == [True] * 3
    assert [_pods.confirms_pod("MODIFIED", one) for one in [*urgent, pod(restarts=1)]] == [
        False
    ] * 5
    assert not _pods.confirms_pod("DELETED", pod())

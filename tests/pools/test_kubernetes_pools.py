"""A pool's Kubernetes objects say what the pool says, and leave the count to whoever scales it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomad_watchdog.config_pools import AgentPool
from nomad_watchdog.errors import UserError
from nomad_watchdog.pools.kubernetes import _quantity, manifests, text


def pool(**more: object) -> AgentPool:
    values: dict[str, Any] = {
        "image": "registry/encoder:1",
        "command": ("--queue", "jobs"),
        "env": {"MODE": "fast"},
        "max": 9,
        "metric": ({"kind": "cpu", "target": 70.0},),
        "scaler": "external",
    }
    return AgentPool.model_validate(values | more)


def made(one: AgentPool) -> list[dict[str, Any]]:
    return manifests("encoder", one, namespace="watch", installation="i-1")


def test_the_deployment_has_the_worker_and_no_count() -> None:
    """Image, arguments, environment, share and grace are the pool's; `replicas` is nobody's."""
    deployment, _ = made(pool(cpu=250, memory="64Mi", kill_timeout="12500ms"))
    (container,) = deployment["spec"]["template"]["spec"]["containers"]

    assert "replicas" not in deployment["spec"]
    assert container["args"] == ["--queue", "jobs"]
    assert {"name": "MODE", "value": "fast"} in container["env"]
    assert container["resources"]["requests"] == {"cpu": "250m", "memory": str(64 * 1024 * 1024)}
    assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 13
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_nothing_a_worker_does_not_need_is_given_to_it() -> None:
    """No root, no capability, no token of the API server, no file system to write."""
    (deployment, _) = made(pool())
    spec = deployment["spec"]["template"]["spec"]
    security = spec["containers"][0]["securityContext"]

    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert (security["readOnlyRootFilesystem"], security["capabilities"]) == (
        True,
        {"drop": ["ALL"]},
    )


def test_the_autoscaler_has_the_bounds_and_the_calm_of_the_pool() -> None:
    """min, max, target, steps, cool-downs and the settling window are found again in autoscaling/v2."""
    _, scaler = made(pool(min=2, cooldown_up="15s", cooldown_down="3m", settle="5m", step_down=2))
    spec = scaler["spec"]

    assert (spec["minReplicas"], spec["maxReplicas"]) == (2, 9)
    assert spec["scaleTargetRef"]["name"] == "pool-encoder"
    assert spec["metrics"] == [
        {
            "type": "Resource",
            "resource": {
                "name": "cpu",
                "target": {"type": "Utilization", "averageUtilization": 70},
            },
        }
    ]
    assert spec["behavior"]["scaleUp"] == {
        "stabilizationWindowSeconds": 0,
        "policies": [{"type": "Pods", "value": 4, "periodSeconds": 15}],
        "selectPolicy": "Max",
    }
    assert spec["behavior"]["scaleDown"]["stabilizationWindowSeconds"] == 300
    assert spec["behavior"]["scaleDown"]["policies"][0] == {
        "type": "Pods",
        "value": 2,
        "periodSeconds": 180,
    }


@pytest.mark.parametrize(
    ("of", "target"),
    [
        ("all", {"type": "AverageValue", "averageValue": "2500m"}),
        ("worker", {"type": "Value", "value": "2500m"}),
    ],
)
def test_a_sum_is_shared_and_an_average_is_compared(of: str, target: dict[str, str]) -> None:
    """A query over all workers becomes AverageValue, one of a single worker Value."""
    metric = {"kind": "prometheus", "url": "http://p", "query": "q", "target": 2.5, "of": of}
    _, scaler = made(pool(metric=(metric | {"name": "jobs-waiting"},)))
    (found,) = scaler["spec"]["metrics"]

    assert found["external"] == {"metric": {"name": "jobs-waiting"}, "target": target}


@pytest.mark.parametrize("kind", ["builtin", "none"])
def test_only_an_external_pool_has_an_autoscaler(kind: str) -> None:
    """Two scalers on one pool would pull at it."""
    assert [one["kind"] for one in made(pool(scaler=kind))] == ["Deployment"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image": None}, "needs an image"),
        (
            {"metric": ({"kind": "queue", "url": "http://q", "value": "n", "target": 1.0},)},
            "needs name",
        ),
        (
            {
                "min": 0,
                "metric": ({"kind": "queue", "url": "http://q", "value": "n", "target": 1.0},),
            },
            "scales none to 0",
        ),
    ],
)
def test_what_kubernetes_can_not_have_is_said(change: dict[str, Any], said: str) -> None:
    """No image, a metric that no adapter can be asked for, and a least number of 0."""
    with pytest.raises(UserError, match=said):
        made(pool(**change))


@given(st.floats(0.001, 1e12))
def test_a_quantity_is_close_to_the_number(value: float) -> None:
    """What Kubernetes reads is within half a thousandth."""
    said = _quantity(value)
    read = int(said[:-1]) / 1000 if said.endswith("m") else int(said)

    assert math.isclose(read, value, abs_tol=0.00051, rel_tol=1e-9)


@given(st.floats(0, 3600 * 24), st.floats(0, 3600 * 24))
def test_times_are_within_what_the_api_takes(settle: float, cooldown: float) -> None:
    """A window of 0 to 3600 s and a period of 1 to 1800 s, whatever the pool says."""
    _, scaler = made(pool(settle=settle, cooldown_up=cooldown, cooldown_down=cooldown))
    for rules in scaler["spec"]["behavior"].values():
        assert 0 <= rules["stabilizationWindowSeconds"] <= 3600
        assert all(1 <= one["periodSeconds"] <= 1800 for one in rules["policies"])


def test_the_manifests_are_one_document_for_kubectl() -> None:
    """A List whose items are the objects, in the order in which they are applied."""
    whole = json.loads(text(made(pool())))

    assert [one["kind"] for one in whole["items"]] == ["Deployment", "HorizontalPodAutoscaler"]

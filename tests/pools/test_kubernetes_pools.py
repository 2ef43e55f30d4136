"""A pool's Kubernetes objects match its settings, and leave the count to whatever scales it."""

from __future__ import annotations

import math
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nomad_watchdog.clients.kubernetes import KubernetesClient
from nomad_watchdog.clients.kubernetes_quantities import number
from nomad_watchdog.config.pools import PoolSettings
from nomad_watchdog.errors import DeniedError, NotFoundError, TerminalError, UserError
from nomad_watchdog.pools._kubernetes_objects import _quantity, manifests, used
from nomad_watchdog.pools.kubernetes import KubernetesPools
from nomad_watchdog.schedulers.kubernetes import KubernetesScheduler
from servers.kubernetes import KubernetesCluster
from tests.pools.shared import a_pool_of_another_is_left_alone
from tests.schedulers.kubernetes.hosted import path_of
from tests.schedulers.kubernetes.test_manifests import USER, install


def pool(**more: object) -> PoolSettings:
    values: dict[str, Any] = {
        "image": "registry/encoder:1",
        "command": ("--queue", "jobs"),
        "env": {"MODE": "fast"},
        "max": 9,
        "metric": ({"kind": "cpu", "target": 70.0},),
        "scaler": "external",
    }
    return PoolSettings.model_validate(values | more)


def made(one: PoolSettings) -> list[Any]:
    found = manifests("encoder", one, namespace="watch", installation="i-1")
    return [one for one in (found.deployment, found.autoscaler) if one is not None]


def test_the_deployment_has_the_worker_and_no_count() -> None:
    """Image, arguments, environment, share and grace period are the pool's; `replicas` is not set."""
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
    """No root, no capability, no token of the API server, no writable file system."""
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
    """min, max, target, steps, cool-downs and the settling window are set in autoscaling/v2."""
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
    """A query over all workers becomes AverageValue, one for a single worker Value."""
    metric = {"kind": "prometheus", "url": "http://p", "query": "q", "target": 2.5, "of": of}
    _, scaler = made(pool(metric=(metric | {"name": "jobs-waiting"},)))
    (found,) = scaler["spec"]["metrics"]

    assert found["external"] == {"metric": {"name": "jobs-waiting"}, "target": target}


@pytest.mark.parametrize("kind", ["builtin", "none"])
def test_only_an_external_pool_has_an_autoscaler(kind: str) -> None:
    """Two scalers on one pool would work against each other."""
    assert [one["kind"] for one in made(pool(scaler=kind))] == ["Deployment"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image": None}, "needs an image"),
        (
            {"metric": ({"kind": "queue", "url": "http://q", "value": "n", "target": 1.0},)},
            "needs `name`",
        ),
        (
            {
                "min": 0,
                "metric": ({"kind": "queue", "url": "http://q", "value": "n", "target": 1.0},),
            },
            "does not scale to 0",
        ),
    ],
)
def test_what_kubernetes_can_not_have_is_said(change: dict[str, Any], said: str) -> None:
    """No image, a metric that no adapter can serve, and a minimum of 0 are rejected."""
    with pytest.raises(UserError, match=said):
        made(pool(**change))


@given(st.floats(0.001, 1e12))
def test_a_quantity_is_close_to_the_number(value: float) -> None:
    """The value that Kubernetes reads is within half a thousandth."""
    said = _quantity(value)

    assert math.isclose(number(said), value, abs_tol=0.00051, rel_tol=1e-9)


@given(st.floats(0, 3600 * 24), st.floats(0, 3600 * 24))
def test_times_are_within_what_the_api_takes(settle: float, cooldown: float) -> None:
    """A window of 0 to 3600 s and a period of 1 to 1800 s, whatever the pool's settings are."""
    _, scaler = made(pool(settle=settle, cooldown_up=cooldown, cooldown_down=cooldown))
    for rules in scaler["spec"]["behavior"].values():
        assert 0 <= rules["stabilizationWindowSeconds"] <= 3600
        assert all(1 <= one["periodSeconds"] <= 1800 for one in rules["policies"])


def test_use_is_in_percent_of_what_a_worker_was_given() -> None:
    """The metrics API's nanocores and kibibytes, summed over all containers."""
    pod = {
        "containers": [
            {"usage": {"cpu": "100000000n", "memory": "16384Ki"}},
            {"usage": {"cpu": "25m", "memory": "16Mi"}},
        ]
    }

    assert used(pod, pool(cpu=250, memory="64Mi")) == pytest.approx((50.0, 50.0))
    for wrong in (
        {},
        {"containers": [{}]},
        {"containers": [{"usage": {"cpu": "x", "memory": "1"}}]},
    ):
        with pytest.raises(ValueError, match=r"usage|quantity"):
            used(wrong, pool())


@pytest.fixture
async def pools(kube: KubernetesCluster) -> AsyncIterator[KubernetesPools]:
    """A driver in its own namespace, on the session's real control plane."""
    namespace = f"pools-{secrets.token_hex(4)}"
    await kube.add_namespace(namespace)
    yield (driver := KubernetesPools(kube.client(), namespace=namespace, installation="i-1"))
    for name in await driver.list_pools():
        await driver.remove(name)
    await driver.close()


async def deployment(driver: KubernetesPools) -> dict[str, Any]:
    return await driver._client.get(driver._path("p"))


def plain(**more: object) -> PoolSettings:
    return pool(scaler="none", metric=(), **more)


async def test_a_pool_is_a_deployment_that_begins_with_the_least_number(
    pools: KubernetesPools,
) -> None:
    """Created with min, scaled up and down by its scale subresource, removed, and removed again."""
    await pools.ensure("p", plain(min=3))
    assert (await pools.list_pools())["p"].count == 3
    await pools.scale("p", 5, "because")
    assert (await pools.list_pools())["p"].count == 5
    await pools.remove("p")
    await pools.remove("p")
    assert "p" not in await pools.list_pools()
    with pytest.raises(NotFoundError):
        await pools.scale("p", 2, "")


async def test_ensure_again_writes_nothing_and_a_change_keeps_the_count(
    pools: KubernetesPools,
) -> None:
    """The same pool leaves the object's version unchanged; another environment changes only the template."""
    await pools.ensure("p", plain())
    await pools.scale("p", 4, "")
    first = await deployment(pools)
    await pools.ensure("p", plain())
    same = await deployment(pools)
    await pools.ensure("p", plain(env={"MODE": "slow"}))
    changed = await deployment(pools)

    assert same["metadata"]["generation"] == first["metadata"]["generation"]
    assert changed["metadata"]["generation"] > first["metadata"]["generation"]
    assert changed["spec"]["replicas"] == 4


async def test_a_pool_that_was_half_made_is_made_to_the_end(
    pools: KubernetesPools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash between the creation of the Deployment and the next steps leaves no pool that looks complete; a deleted
    autoscaler is created again."""

    async def dies(*_: object) -> None:
        raise TerminalError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(pools, "_scale", dies)
        with pytest.raises(TerminalError, match="killed"):
            await pools.ensure("p", pool(min=3))
    await pools.ensure("p", pool(min=3))
    assert (await pools.list_pools())["p"].count == 3
    scaler = pools._scaler("p")
    assert await pools._client.delete(scaler)
    await pools.ensure("p", pool(min=3))

    assert await pools._client.find(scaler) is not None


async def test_bounds_that_moved_move_the_count(pools: KubernetesPools) -> None:
    """Four workers become two if the maximum becomes 2, and six if the minimum becomes 6."""
    await pools.ensure("p", plain(min=4))
    await pools.ensure("p", plain(min=1, max=2))
    assert (await pools.list_pools())["p"].count == 2
    await pools.ensure("p", plain(min=6, max=9))
    assert (await pools.list_pools())["p"].count == 6


async def test_the_api_server_takes_the_autoscaler_and_it_goes_with_the_setting(
    pools: KubernetesPools,
) -> None:
    """`external` creates a HorizontalPodAutoscaler that autoscaling/v2 accepts; `none` removes it."""
    named = {"kind": "queue", "url": "http://q", "value": "n", "target": 2.5, "name": "waiting"}
    await pools.ensure("p", pool(metric=(named,), min=2))
    path = "/apis/autoscaling/v2/namespaces/{}/horizontalpodautoscalers/pool-p"
    path = path.format(pools._namespace)
    found = await pools._client.get(path)
    assert found["spec"]["metrics"][0]["external"]["target"]["averageValue"] == "2500m"
    await pools.ensure("p", plain(min=2))

    assert await pools._client.find(path) is None
    assert (await pools.list_pools())["p"].count >= 1


async def test_a_deployment_of_somebody_else_is_left_alone(
    pools: KubernetesPools, kube: KubernetesCluster
) -> None:
    """Another installation's pool is not listed, not changed, not scaled and not removed."""
    other = KubernetesPools(kube.client(), namespace=pools._namespace, installation="i-2")
    await a_pool_of_another_is_left_alone(pools, other, plain())


async def test_a_pool_is_no_agent_for_the_scheduler(
    pools: KubernetesPools, kube: KubernetesCluster
) -> None:
    """The agents' scheduler of the same installation and namespace lists no placement and no malformed object, and a
    pool's pending pods do not affect its capacity."""
    await pools.ensure("p", plain(min=3))
    scheduler = KubernetesScheduler(
        settings=kube.settings(), namespace=pools._namespace, installation="i-1"
    )
    try:
        snapshot = await scheduler.snapshot()
        assert not snapshot.placements
        assert (await scheduler.capacity()).room
    finally:
        await scheduler.close()


async def test_without_a_metrics_server_use_is_not_known(pools: KubernetesPools) -> None:
    """Without a metrics API the usage is None, not 0."""
    await pools.ensure("p", plain())

    assert await pools.usage("p", plain()) is None


@pytest.mark.asyncio(loop_scope="session")
async def test_the_shipped_rights_are_enough(kube: KubernetesCluster, repository: Path) -> None:
    """The service account of rbac.yaml is denied a pool; with pools.yaml the whole driver works."""
    folder = repository / "jobs" / "kubernetes"
    await install(kube, repository)
    driver = KubernetesPools(
        KubernetesClient(kube.settings(await kube.user(USER))),
        namespace="nomad-watchdog",
        installation="rights",
    )
    admin = kube.client()
    try:
        with pytest.raises(DeniedError, match="horizontalpodautoscalers"):
            await driver.ensure("q", plain())
        for thing in yaml.safe_load_all((folder / "pools.yaml").read_text()):
            await admin.apply(path_of(thing), thing, force=True)
        await driver.ensure("q", plain())
        await driver.scale("q", 2, "")
        assert (await driver.list_pools())["q"].count == 2
        await driver.ensure("q", pool(min=2))
        await driver.ensure("q", plain())
        assert await driver.usage("q", plain()) is None
        await driver.remove("q")
    finally:
        for name in ("roles", "rolebindings"):
            path = f"/apis/rbac.authorization.k8s.io/v1/namespaces/nomad-watchdog/{name}"
            await admin.delete(f"{path}/nomad-watchdog-pools")
        await admin.close()
        await driver.close()

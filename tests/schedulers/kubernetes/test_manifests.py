"""The objects of `kubectl apply -k jobs/kubernetes`: the API server accepts them, and they are
sufficient."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from nomad_watchdog.clients.kubernetes import KubernetesClient
from nomad_watchdog.config.load import load
from nomad_watchdog.config.settings import Settings
from nomad_watchdog.daemon.doctor.base import CheckStatus
from nomad_watchdog.daemon.doctor.checks import examine
from nomad_watchdog.demo.process import free_port
from nomad_watchdog.errors import DeniedError
from nomad_watchdog.model import Epoch, Placement
from nomad_watchdog.schedulers.kubernetes import KubernetesScheduler, names
from nomad_watchdog.testing.conformance import record_of
from servers.kubernetes import KubernetesCluster
from tests.schedulers.kubernetes.hosted import apply
from tests.schedulers.kubernetes_rig import spec_of

USER = "system:serviceaccount:nomad-watchdog:nomad-watchdog"


def documents(folder: Path) -> list[dict[str, Any]]:
    """All documents that the kustomization names, in its order."""
    listed = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    return [one for name in listed for one in yaml.safe_load_all((folder / name).read_text())]


async def install(kube: KubernetesCluster, repository: Path) -> None:
    client = kube.client()
    try:
        things = documents(repository / "jobs" / "kubernetes")
        await apply(client, [one for one in things if one["kind"] != "Deployment"])
    finally:
        await client.close()


def test_the_guide_names_all_that_is_made_and_all_that_is_not(repository: Path) -> None:
    """The guide names each kind in the kustomization, and the Secret and the images that it does
    not create."""
    told = (repository / "docs" / "kubernetes.md").read_text().split("\n## ")[0]
    things = documents(repository / "jobs" / "kubernetes")
    assert not [one["kind"] for one in things if one["kind"].lower() not in told.lower()]
    (spec,) = [one["spec"]["template"]["spec"] for one in things if one["kind"] == "Deployment"]
    made = {one["metadata"]["name"] for one in things}
    secrets = {v["secret"]["secretName"] for v in spec["volumes"] if "secret" in v}
    assert secrets - made
    assert all(f"`{name}`" in told for name in secrets - made)
    for word in ("images", "agent/Dockerfile", "--backend kubernetes init"):
        assert word in told


def allowed(policy: dict[str, Any], namespace: dict[str, str], pod: dict[str, str]) -> bool:
    """Whether the rules of a NetworkPolicy let this pod connect, following the Kubernetes
    documentation."""

    def selects(selector: dict[str, Any] | None, labels: dict[str, str]) -> bool:
        selector = selector or {}
        pairs = selector.get("matchLabels", {}).items()
        rules = selector.get("matchExpressions", [])
        assert all(rule["operator"] == "In" for rule in rules)
        return all(labels.get(key) == value for key, value in pairs) and all(
            labels.get(rule["key"]) in rule["values"] for rule in rules
        )

    home = {"kubernetes.io/metadata.name": policy["metadata"]["namespace"]}
    for rule in policy["spec"]["ingress"]:
        if not rule.get("from"):
            return True
        for peer in rule["from"]:
            assert peer.keys() <= {"namespaceSelector", "podSelector"}
            assert peer
            where = peer.get("namespaceSelector", {"matchLabels": home})
            if selects(where, namespace) and selects(peer.get("podSelector"), pod):
                return True
    return False


def test_only_named_peers_may_connect(repository: Path) -> None:
    """The API accepts connections from replicas, agents and namespaces with its label; agents
    accept them from the control plane and from namespaces with their label. A pod elsewhere with
    our labels reaches neither."""
    policies = {
        one["metadata"]["name"]: one
        for one in documents(repository / "jobs" / "kubernetes")
        if one["kind"] == "NetworkPolicy"
    }
    name, app = "kubernetes.io/metadata.name", "app.kubernetes.io/name"
    home, other = {name: "nomad-watchdog"}, {name: "other"}
    plane, agent = {app: "nomad-watchdog"}, {app: "watchdog-agent"}
    cases = (
        (home, plane, True, True),
        (home, agent, True, False),
        (home, {}, False, False),
        (home, {app: "nomad-watchdog-pool"}, False, False),
        (other, plane, False, False),
        (other, agent, False, False),
        (other | {"nomad-watchdog/api-client": "true"}, {}, True, False),
        (other | {"nomad-watchdog/agent-client": "true"}, {}, False, True),
        (other | {"nomad-watchdog/api-client": "false"}, {}, False, False),
    )
    for namespace, pod, api, agents in cases:
        assert allowed(policies["nomad-watchdog"], namespace, pod) is api, (namespace, pod)
        assert allowed(policies["watchdog-agents"], namespace, pod) is agents, (namespace, pod)


def test_the_configuration_in_the_manifest_is_accepted(repository: Path, tmp_path: Path) -> None:
    """The HCL in the ConfigMap passes our own check."""
    (config,) = [
        one for one in documents(repository / "jobs" / "kubernetes") if one["kind"] == "ConfigMap"
    ]
    file = tmp_path / "nomad-watchdog.hcl"
    file.write_text(config["data"]["nomad-watchdog.hcl"])

    assert load(file, {}).backend == "kubernetes"


@pytest.mark.asyncio(loop_scope="session")
async def test_the_api_server_accepts_every_manifest(
    kube: KubernetesCluster, repository: Path
) -> None:
    """Each document is applied with strict validation; the reconciler's Deployment as a dry run."""
    await install(kube, repository)
    client = kube.client()
    try:
        (deployment,) = [
            one
            for one in documents(repository / "jobs" / "kubernetes")
            if one["kind"] == "Deployment"
        ]
        answer = await apply(client, [deployment], dryRun="All")
    finally:
        await client.close()

    assert answer["spec"]["replicas"] == 2


@pytest.mark.parametrize("workload", ["deployment", "statefulset", "pod"])
@pytest.mark.asyncio(loop_scope="session")
async def test_the_role_is_enough_and_no_more(
    kube: KubernetesCluster, repository: Path, workload: str
) -> None:
    """With the service account of rbac.yaml the whole backend works; other namespaces and reading
    Secrets are denied."""
    await install(kube, repository)
    kubeconfig = await kube.user(USER)
    scheduler = KubernetesScheduler(
        settings=kube.settings(kubeconfig), namespace="nomad-watchdog", installation=workload
    )
    client = KubernetesClient(kube.settings(kubeconfig))
    spec = replace(
        spec_of(variables={"workload": workload}),
        agent_config={"v": 1, "credential": "hunter2"},
    )
    record = record_of(f"rights-{workload}")
    try:
        await scheduler.prepare([spec])
        await scheduler.ensure(record, Epoch(1), spec)
        found: tuple[Placement, ...] = ()
        async with asyncio.timeout(30):
            # A bare Pod must be gone before its successor can be created, so ensure is repeated.
            while not any(one.epoch == Epoch(2) for one in found):
                await scheduler.ensure(record, Epoch(2), spec)
                found = (await scheduler.snapshot()).placements.get(record.slug, ())
                await asyncio.sleep(0.05)
        placement = found[-1]
        await scheduler.retire(placement, 1.0)
        await scheduler.capacity()
        for denied in (
            f"/api/v1/namespaces/nomad-watchdog/secrets/{names.name_of(record.slug)}-1",
            "/api/v1/namespaces/nomad-watchdog/secrets",
            "/api/v1/namespaces/default/pods",
            "/apis/apps/v1/deployments",
            "/api/v1/nodes/plane",
            "/api/v1/persistentvolumes",
        ):
            with pytest.raises(DeniedError):
                await client.get(denied)
    finally:
        await client.close()
        await scheduler.close()


def settings_of(
    folder: Path, kubeconfig: Path, namespace: str = "nomad-watchdog", namespaces: int = 1
) -> Settings:
    file = folder / "nomad-watchdog.hcl"
    file.write_text(
        f'backend = "kubernetes"\ndata_dir = "{folder}"\nregistry {{\n kind = "sqlite"\n}}\n'
        'consul {\n agent_address = ""\n}\n'
        f'kubernetes {{\n kubeconfig = "{kubeconfig}"\n namespace = "{namespace}"\n'
        f" namespaces = {namespaces}\n}}\n"
    )
    return load(file, {})


@pytest.mark.asyncio(loop_scope="session")
async def test_doctor_says_what_is_missing(
    kube: KubernetesCluster, repository: Path, tmp_path: Path
) -> None:
    """With the Role every cluster check passes; a user without permissions, who may not even see
    the namespace, gets a list of all missing permissions."""
    await install(kube, repository)
    found = {}
    for name in (USER, "stranger"):
        checks = await examine(settings_of(tmp_path, await kube.user(name)), {})
        found[name] = {one.name: one for one in checks if one.name.startswith("kubernetes")}

    assert {one.status for one in found[USER].values()} == {CheckStatus.OK}, found[USER]
    assert len(found[USER]) == 5
    told = found["stranger"]["kubernetes nodes"]
    assert (told.status, "lacks list, watch" in told.found) == (CheckStatus.WARN, True)
    told = found["stranger"]["kubernetes namespace nomad-watchdog"]
    assert (told.status, told.found) == (CheckStatus.WARN, "can't be read")
    told = found["stranger"]["kubernetes rights in nomad-watchdog"]
    assert told.status is CheckStatus.FAIL
    for right in ("lacks get deployments", "get pods/log", "create configmaps",
                  "get configmaps/nomad-watchdog", "patch configmaps/nomad-watchdog"):  # fmt: skip
        assert right in told.found
    assert "jobs/kubernetes/rbac.yaml" in told.fix


@pytest.mark.asyncio(loop_scope="session")
async def test_doctor_asks_for_the_record_by_its_name(
    kube: KubernetesCluster, repository: Path, tmp_path: Path
) -> None:
    """If the Role lacks the ConfigMap of the first namespace, doctor reports it; the other
    namespaces do not need it."""
    await kube.add_namespace("doctor")
    await kube.add_namespace("doctor-1")
    (role,) = [
        one for one in documents(repository / "jobs" / "kubernetes") if one["kind"] == "Role"
    ]
    client = kube.client()
    try:
        for space in ("doctor", "doctor-1"):
            path = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{space}"
            rules = [one for one in role["rules"] if "resourceNames" not in one]
            if space == "doctor-1":
                rules = [one for one in rules if one["resources"] != ["configmaps"]]
            meta = {"name": "halved", "namespace": space}
            await client.create(f"{path}/roles", {**role, "metadata": meta, "rules": rules})
            subject = {"kind": "User", "name": "halved", "apiGroup": "rbac.authorization.k8s.io"}
            ref = {"kind": "Role", "name": "halved", "apiGroup": "rbac.authorization.k8s.io"}
            binding = {"metadata": meta, "roleRef": ref, "subjects": [subject]}
            await client.create(f"{path}/rolebindings", binding)
    finally:
        await client.close()
    checks = await examine(settings_of(tmp_path, await kube.user("halved"), "doctor", 2), {})
    found = {one.name: one.found for one in checks if one.name.startswith("kubernetes rights")}

    assert found == {
        "kubernetes rights in doctor": "lacks get configmaps/nomad-watchdog, patch configmaps/nomad-watchdog",
        "kubernetes rights in doctor-1": "all required rights",
    }


@pytest.mark.asyncio(loop_scope="session")
async def test_doctor_looks_at_every_namespace_that_was_ever_used(
    kube: KubernetesCluster, repository: Path, tmp_path: Path
) -> None:
    """After the number is lowered, the omitted namespace is still read, and its missing permissions
    are reported."""
    await install(kube, repository)
    client = kube.client()
    record = names.record_path("nomad-watchdog")
    body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": names.RECORD}}
    try:
        await kube.add_namespace("nomad-watchdog-1")
        await client.apply(record, {**body, "data": {"namespaces": "2"}}, force=True)
        checks = await examine(settings_of(tmp_path, await kube.user(USER)), {})
    finally:
        await client.delete(record)
        await client.close()
    (told,) = [one for one in checks if one.name == "kubernetes rights in nomad-watchdog-1"]

    assert told.status is CheckStatus.FAIL
    assert "lacks get deployments" in told.found


async def test_doctor_names_a_server_that_does_not_answer(tmp_path: Path) -> None:
    """If nothing listens, the connection check fails and names the setting to check."""
    nobody = {
        "current-context": "x",
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{free_port()}"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c"}}],
    }
    (tmp_path / "kubeconfig").write_text(json.dumps(nobody))
    checks = await examine(settings_of(tmp_path, tmp_path / "kubeconfig"), {})
    (told,) = [one for one in checks if one.name.startswith("kubernetes")]

    assert (told.name, told.status) == ("kubernetes reachable", CheckStatus.FAIL)
    assert "does not answer" in told.found
    assert "kubernetes.kubeconfig" in told.fix

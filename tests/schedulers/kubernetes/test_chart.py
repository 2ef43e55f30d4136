"""The Helm chart: it matches the kustomization, and its values take effect."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import subprocess
import tomllib
from copy import deepcopy
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from nomad_watchdog.clients.kubernetes import KubernetesClient
from nomad_watchdog.config.load import load
from nomad_watchdog.demo.devices import SimulatedFleet
from nomad_watchdog.demo.process import clean_environment
from servers.certificates import Authority
from servers.consul import ConsulServer
from servers.kubelet.__main__ import Kubelet
from servers.kubernetes import KubernetesCluster
from tests.schedulers.kubernetes.hosted import (
    ACCOUNT,
    CONFIG,
    IMAGES,
    TOKEN,
    ServiceProxy,
    agents_of,
    apply,
    cleaned,
    pods_of,
    secret_of,
    until,
)
from tests.schedulers.kubernetes.test_manifests import documents

OURS = ("app.kubernetes.io/managed-by", "helm.sh/chart")


class Chart:
    """jobs/helm/nomad-watchdog, rendered by the real Helm."""

    def __init__(self, helm: Path, repository: Path, home: Path) -> None:
        self.folder = repository / "jobs" / "helm" / "nomad-watchdog"
        self._helm, self._home = helm, home

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        env = clean_environment() | {"HOME": str(self._home)}
        return subprocess.run(
            [self._helm, *arguments],
            capture_output=True,
            text=True,
            check=False,
            env=env,
            timeout=150,
        )

    def template(self, values: dict[str, Any], namespace: str = "nomad-watchdog") -> Any:
        """The rendered objects, or the error if Helm rejects the values."""
        file = self._home / "values.json"
        file.write_text(json.dumps(values))
        done = self.run("template", "nomad-watchdog", self.folder, "-n", namespace,
                        "--kube-version", "1.34.0", "-f", file)  # fmt: skip
        if done.returncode != 0:
            return done.stderr
        return [one for one in yaml.safe_load_all(done.stdout) if one]


@pytest.fixture
def chart(helm: Path, repository: Path, tmp_path: Path) -> Chart:
    return Chart(helm, repository, tmp_path)


def by_name(things: list[dict[str, Any]]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """The objects without what only a chart has: its two labels, and the configuration annotation
    that restarts pods."""
    found = {}
    for thing in deepcopy(things):
        meta = thing["metadata"]
        labels = {k: v for k, v in meta.pop("labels", {}).items() if k not in OURS}
        thing["metadata"] = meta | ({"labels": labels} if labels else {})
        if thing["kind"] == "Deployment":
            thing["spec"]["template"]["metadata"].pop("annotations", None)
        found[thing["kind"], meta.get("namespace", ""), meta["name"]] = thing
    return found


def the(kind: str, things: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = [one for one in things if one["kind"] == kind]
    return found


def test_helm_finds_nothing_to_complain_about(chart: Chart) -> None:
    """`helm lint --strict` passes."""
    done = chart.run("lint", "--strict", chart.folder)

    assert done.returncode == 0, done.stdout


def test_the_chart_makes_what_the_kustomization_makes(chart: Chart, repository: Path) -> None:
    """With default values, pool permissions and the Job that creates the registry, the objects
    equal the kustomization's, except for the namespace, which Helm creates."""
    folder = repository / "jobs" / "kubernetes"
    shipped = [one for one in documents(folder) if one["kind"] != "Namespace"]
    pools, init = (
        list(yaml.safe_load_all((folder / name).read_text()))
        for name in ("pools.yaml", "init.yaml")
    )

    assert by_name(chart.template({})) == by_name(shipped)
    assert by_name(chart.template({"rbac": {"pools": True}})) == by_name([*shipped, *pools])
    assert by_name(chart.template({"init": True})) == by_name([*shipped, *init])
    own = [one for one in shipped if not one["kind"].startswith("ClusterRole")]
    assert by_name(chart.template({"rbac": {"nodes": False}})) == by_name(own)


def test_the_versions_agree(repository: Path, chart: Chart) -> None:
    """The chart's version equals the package's."""
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    told = yaml.safe_load((chart.folder / "Chart.yaml").read_text())

    assert (told["version"], told["appVersion"]) == (project["version"], project["version"])


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"replicas": "two"}, "/replicas"),
        ({"replica": 2}, "'replica' not allowed"),
        ({"image": {"digest": "sha256:12"}}, "/image/digest"),
        ({"api": {"secret": ""}}, "/api/secret"),
        ({"api": {"advertise": "nomad-watchdog:9670"}}, "/api/advertise"),
        ({"api": {"hosts": "watch.example"}}, "/api/hosts"),
        ({"api": {"hosts": ["a,b"]}}, "/api/hosts/0"),
        ({"api": {"hosts": [""]}}, "/api/hosts/0"),
        ({"api": {"tlsSecret": "A_b"}}, "/api/tlsSecret"),
        ({"devices": {"namespaces": 65}}, "/devices/namespaces"),
        ({"devices": {"namespace": "a: b"}}, "/devices/namespace"),
        ({"podDisruptionBudget": {"maxUnavailableAgents": "110%"}}, "/podDisruptionBudget"),
        ({"config": ""}, "/config"),
        ({"env": [{"value": "x"}]}, "/env/0"),
        ({"resources": {"limit": {}}}, "'limit' not allowed"),
    ],
)
def test_a_wrong_value_is_refused(chart: Chart, values: dict[str, Any], word: str) -> None:
    """The schema rejects each of these, and the error names the value."""
    told = chart.template(values)

    assert "specifications of the schema" in told
    assert word in told


def test_the_default_values_are_those_of_the_schema(chart: Chart) -> None:
    """Every value is in both, so that no value is unchecked."""
    schema = json.loads((chart.folder / "values.schema.json").read_text())
    values = yaml.safe_load((chart.folder / "values.yaml").read_text())
    known = {key: set(one.get("properties", {})) for key, one in schema["properties"].items()}

    assert known.keys() - {"global"} == values.keys()
    for key, inner in values.items():
        if known[key] - {"claims"}:
            assert known[key] - {"claims"} == set(inner), key


def test_the_guide_shows_values_that_are_accepted_and_names_all(
    chart: Chart, repository: Path, tmp_path: Path
) -> None:
    """The YAML in the guide renders, its configuration passes our own check, and every value is
    documented."""
    told = (
        (repository / "docs" / "kubernetes.md")
        .read_text()
        .split("\n## Helm\n")[1]
        .split("\n## ")[0]
    )
    (block,) = re.findall(r"```yaml\n(.*?)```", told, re.DOTALL)
    things = chart.template(yaml.safe_load(block))
    file = tmp_path / "nomad-watchdog.hcl"
    file.write_text(the("ConfigMap", things)["data"]["nomad-watchdog.hcl"])
    values = yaml.safe_load((chart.folder / "values.yaml").read_text())

    assert list(load(file, {}).agent_class) == ["camera"]
    assert the("Deployment", things)["spec"]["template"]["spec"]["containers"][0]["image"] == (
        "registry.example/nomad-watchdog:0.1.0"
    )
    assert [name for name in values if f"`{name}`" not in told] == []


def test_monitoring_is_rendered_on_request(chart: Chart, repository: Path) -> None:
    """The rules with absolute links, the dashboards, and a ServiceMonitor that selects our Service and has the token
    and the CA. By default none of them."""
    ours = {"monitoring": {"enabled": True, "labels": {"release": "prometheus"}, "docsUrl": "https://docs/",
                           "grafanaUrl": "https://grafana"}}  # fmt: skip
    things = chart.template(ours | {"api": {"secret": "api", "tlsSecret": "tls"}})
    kinds = {one["kind"] for one in chart.template({})}
    assert not kinds & {"ServiceMonitor", "PrometheusRule"}

    shipped = yaml.safe_load((repository / "jobs/prometheus/nomad-watchdog.rules.yml").read_text())
    rule = the("PrometheusRule", things)
    assert rule["metadata"]["labels"]["release"] == "prometheus"
    for group in shipped["groups"]:
        for one in group["rules"]:
            if "alert" in one:
                at = one["annotations"]["runbook"].removeprefix("docs/")
                one["annotations"]["runbook_url"] = f"https://docs/{at}"
                one["annotations"]["dashboard_url"] = "https://grafana/d/nomad-watchdog-fleet"
    assert rule["spec"] == shipped

    monitor = the("ServiceMonitor", things)["spec"]
    (endpoint,) = monitor["endpoints"]
    service = the("Service", things)
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert endpoint["scheme"] == "https"
    assert endpoint["authorization"] == {"credentials": {"name": "api", "key": "token"}}
    assert endpoint["tlsConfig"]["ca"]["secret"] == {"name": "tls", "key": "ca.crt"}

    boards = {path.name: path.read_text() for path in (repository / "jobs/grafana").iterdir()}
    shown = [one["data"] for one in things if "dashboard" in one["metadata"]["name"]]
    assert {name: text for data in shown for name, text in data.items()} == boards


def test_every_value_has_its_place(chart: Chart, tmp_path: Path) -> None:
    """Image, names, namespaces, peers and pod additions appear where they belong; a user's variable
    overrides ours; the permissions for the record are in the first namespace only."""
    peer = {"podSelector": {"matchLabels": {"a": "b"}}}
    digest = "sha256:" + "0" * 64
    things = chart.template(
        {
            "replicas": 3,
            "image": {"repository": "registry.example/w", "digest": digest, "pullPolicy": "Always"},
            "imagePullSecrets": [{"name": "pull"}],
            "config": '  # indented\nbackend = "kubernetes"\n',
            "api": {"secret": "door", "advertise": "https://watchdog.example", "hosts": ["a.example", "b"]},
            "consul": {"tokenSecret": "consul"},
            "devices": {"namespace": "0123", "namespaces": 2, "createNamespaces": True},
            "networkPolicy": {"apiFrom": [peer], "agentsFrom": [peer]},
            "podDisruptionBudget": {"maxUnavailable": "50%", "maxUnavailableAgents": 7},
            "priorityClassName": "high",
            "init": True,
            "tolerations": [{"operator": "Exists"}],
            "podLabels": {"team": "x", "app.kubernetes.io/name": "no"},
            "env": [{"name": "NOMAD_WATCHDOG_API_LISTEN", "value": "$(POD_IP):1"}],
            "volumes": [{"name": "ca", "configMap": {"name": "ca"}}],
            "volumeMounts": [{"name": "ca", "mountPath": "/ca"}],
        },
        namespace="control",
    )  # fmt: skip
    spaces = {
        (one["kind"], one["metadata"]["name"], one["metadata"].get("namespace")) for one in things
    }
    for space in ("0123", "0123-1"):
        assert {("Role", "nomad-watchdog", space), ("NetworkPolicy", "watchdog-agents", space),
                ("PodDisruptionBudget", "watchdog-agents", space), ("Namespace", space, None)} < spaces  # fmt: skip
    records = [
        one["metadata"]["namespace"] for one in things
        if one["kind"] == "Role" and any("configmaps" in rule["resources"] for rule in one["rules"])
    ]  # fmt: skip
    assert records == ["0123"]
    assert all(
        one["subjects"][0]["namespace"] == "control"
        for one in things
        if one["kind"] == "RoleBinding"
    )
    for one in things:
        if one["kind"] == "NetworkPolicy":
            *ours, theirs = one["spec"]["ingress"][0]["from"]
            assert theirs == peer
            if one["metadata"]["name"] == "watchdog-agents":
                where = ours[0]["namespaceSelector"]["matchLabels"]
                assert where == {"kubernetes.io/metadata.name": "control"}
                continue
            assert "namespaceSelector" not in ours[0]
            (where,) = ours[1]["namespaceSelector"]["matchExpressions"]
            assert where == {
                "key": "kubernetes.io/metadata.name", "operator": "In", "values": ["0123", "0123-1"]
            }  # fmt: skip
    assert the("ConfigMap", things)["data"]["nomad-watchdog.hcl"].startswith("  # indented\n")
    deployment = the("Deployment", things)["spec"]
    spec = deployment["template"]["spec"]
    (container,) = spec["containers"]
    job = the("Job", things)["spec"]["template"]["spec"]
    assert job["tolerations"] == spec["tolerations"] == [{"operator": "Exists"}]
    env = {one["name"]: one.get("value", one.get("valueFrom")) for one in container["env"]}
    assert len(env) == len(container["env"])
    assert env["NOMAD_WATCHDOG_API_LISTEN"] == "$(POD_IP):1"
    assert env["NOMAD_WATCHDOG_API_ADVERTISE"] == "https://watchdog.example"
    assert env["NOMAD_WATCHDOG_API_HOSTS"] == "a.example,b"
    texts = {name: value for name, value in env.items() if name == "NOMAD_WATCHDOG_API_HOSTS"}
    file = tmp_path / "nomad-watchdog.hcl"
    file.write_text('agent_class "default" {\n  probe "tcp" {\n    port = 80\n  }\n}\n')
    assert load(file, texts).api.hosts == ("a.example", "b")
    assert env["NOMAD_WATCHDOG_KUBERNETES_NAMESPACE"] == "0123"
    assert env["NOMAD_WATCHDOG_KUBERNETES_NAMESPACES"] == "2"
    assert env["CONSUL_HTTP_TOKEN"] == {"secretKeyRef": {"name": "consul", "key": "token"}}
    assert (deployment["replicas"], spec["priorityClassName"]) == (3, "high")
    assert deployment["template"]["metadata"]["labels"] == {
        "team": "x",
        "app.kubernetes.io/name": "nomad-watchdog",
    }
    assert container["image"] == f"registry.example/w@{digest}"
    assert {"name": "ca", "mountPath": "/ca"} in container["volumeMounts"]
    assert "door" in [one["secret"]["secretName"] for one in spec["volumes"] if "secret" in one]


def test_a_changed_configuration_makes_new_pods(chart: Chart) -> None:
    """Different configurations give different pod templates; the same configuration gives the same
    one."""
    one, two, again = (
        the("Deployment", chart.template({"config": config}))["spec"]["template"]
        for config in ("shards = 1", "shards = 2", "shards = 1")
    )

    assert one == again
    assert one != two


@pytest.mark.timeout(400)
@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.slow_because(
    "installs and upgrades a release: the replicas are rolled one after the other"
)
async def test_a_release_keeps_a_fleet_in_namespaces_of_its_own_and_leaves_it_behind(
    kube: KubernetesCluster,
    admin: KubernetesClient,
    fleet: SimulatedFleet,
    chart: Chart,
    tmp_path: Path,
) -> None:
    """`helm install --wait` creates the registry and ends when two replicas are ready. With only
    the chart's permissions they start agents in two other namespaces, which report over TLS; the
    replicas also use TLS between each other. An upgrade with another configuration rolls the
    replicas but no agent, and after `helm uninstall` the agents keep running (L3)."""
    spaces = ("chart-devices", "chart-devices-1")
    proxy = ServiceProxy(admin, "chart", "nomad-watchdog", scheme="https")
    authority = Authority(tmp_path / "pki")
    await authority.make()
    pair = await authority.issue("watchdog", "/CN=nomad-watchdog", san="IP:127.0.0.1")
    names = {"ca.crt": authority.cert, "tls.crt": pair[0], "tls.key": pair[1]}
    certificates = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "watchdog-tls", "namespace": "chart"},
        "stringData": {name: file.read_text() for name, file in names.items()},
    }
    trusting = ssl.create_default_context(cafile=str(authority.cert))
    headers = {"Authorization": f"Bearer {TOKEN}"}
    kubeconfig = f"--kubeconfig={kube.kubeconfig}"
    await kube.add_namespace("chart")
    async with (
        ConsulServer(tmp_path / "consul") as consul,
        Kubelet(kube.kubeconfig, tmp_path / "node", images=IMAGES, node="chart", subnet=27) as node,
        cleaned(admin, "chart", *spaces),
        proxy.serve(),
        aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=5.0)) as session,
    ):
        await apply(admin, [secret_of("chart"), certificates])
        config = CONFIG.replace("CONSUL", consul.http_addr).replace("PORT", str(fleet.port))

        async def release(verb: str, text: str) -> None:
            file = tmp_path / "release.json"
            values = {
                "init": True,
                "config": text,
                "api": {"advertise": proxy.address, "tlsSecret": "watchdog-tls"},
                "devices": {"namespace": spaces[0], "namespaces": 2, "createNamespaces": True},
                "env": [
                    {"name": "NOMAD_WATCHDOG_API_LISTEN", "value": "$(POD_IP):9670"},
                    {"name": "NOMAD_WATCHDOG_KUBERNETES_SERVICE_ACCOUNT", "value": ACCOUNT},
                ],
            }
            file.write_text(json.dumps(values))
            done = await asyncio.to_thread(
                chart.run, verb, "watchdog", chart.folder, "-n", "chart", "-f", file, kubeconfig,
                "--wait", "--timeout", "120s",
            )  # fmt: skip
            assert done.returncode == 0, done.stderr

        async def replicas() -> dict[str, str]:
            """Name and address of each replica."""
            pods = await pods_of(admin, "chart", "nomad-watchdog")
            return {one["metadata"]["name"]: one["status"].get("podIP", "") for one in pods}

        async def watched() -> bool:
            """Whether each replica reports all devices as watched, whichever replica the agents
            report to, and receives the other's events."""
            for address in (await replicas()).values():
                api = f"https://{address}:9670/v1"
                tls = {"ssl": trusting, "server_hostname": "127.0.0.1"}
                async with session.get(f"{api}/devices", **tls) as answer:
                    items = (await answer.json())["items"]
                async with session.get(f"{api}/status", **tls) as answer:
                    feed = (await answer.json())["event_feed"]
                if len(items) != 12 or {one["verdict"] for one in items} != {"watched"}:
                    return False
                if feed["problem"]:
                    return False
            return True

        await release("install", config)
        for number in range(12):
            device = await fleet.add(f"meter-{number}")
            path = f"/v1/devices/meter-{number}"
            url, body = proxy.address + path, {"address": device.address}
            async with session.put(url, json=body, ssl=trusting) as answer:
                assert answer.status == 201, await answer.text()
        await until(watched, "all watched")
        agents = {space: await agents_of(admin, node, space) for space in spaces}
        assert all(agents.values()), agents

        before = await replicas()
        await release("upgrade", config + 'resync = "10s"\n')

        async def rolled() -> bool:
            now = await replicas()
            return len(now) == 2 and not now.keys() & before.keys()

        await until(rolled, "new replicas")
        await until(watched, "all watched again")
        done = await asyncio.to_thread(
            chart.run, "uninstall", "watchdog", "-n", "chart", kubeconfig, "--wait"
        )
        assert done.returncode == 0, done.stderr

        async def gone() -> bool:
            return not await replicas()

        await until(gone, "the end of the replicas")
        assert {space: await agents_of(admin, node, space) for space in spaces} == agents

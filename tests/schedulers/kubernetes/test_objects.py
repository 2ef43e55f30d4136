"""Kubernetes objects from specs: what the template provides, what we add, and what is rejected."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from nomad_watchdog.errors import UserError
from nomad_watchdog.ids import DeviceId, Slug, slug_of
from nomad_watchdog.model import AgentSpec, Epoch
from nomad_watchdog.schedulers.kubernetes import names, objects
from nomad_watchdog.testing.conformance import hostile_device_ids, record_of

SPEC = AgentSpec("camera", "1.0+b2", "h1", kill_timeout_s=7.5)


def made(spec: AgentSpec = SPEC, device: str = "device-1", secret: str = "") -> dict[str, Any]:
    built = objects.build(spec)
    record = record_of(device)
    labels = objects.labels_of(
        record, Epoch(3), spec, kind=built.kind, shard=5, installation="here"
    )
    document, _ = objects.document_of(record, Epoch(3), spec)
    return objects.workload(built, record, spec, labels=labels, document=document, secret=secret)


def agent_of(thing: dict[str, Any]) -> dict[str, Any]:
    (agent,) = thing["spec"]["template"]["spec"]["containers"]
    found: dict[str, Any] = agent
    return found


def test_a_start_prefers_other_nodes_than_those_to_avoid(repository: Path) -> None:
    """The preference has the highest weight and is added to those of the template. Without nodes to avoid there is none."""
    assert "affinity" not in made()["spec"]["template"]["spec"]
    term = {"weight": 1, "preference": {"matchExpressions": [{"key": "ssd", "operator": "Exists"}]}}
    kind = "preferredDuringSchedulingIgnoredDuringExecution"
    document = yaml.safe_load((repository / "jobs/kubernetes/device-watchdog.yaml").read_text())
    pod = document["spec"]["template"]["spec"]
    pod["affinity"] = {"nodeAffinity": {kind: [term]}, "podAntiAffinity": {}}
    spec = replace(SPEC, text=yaml.safe_dump(document), avoid=("n1", "n2"))
    found = made(spec)["spec"]["template"]["spec"]["affinity"]
    fields = [
        {"key": "metadata.name", "operator": "NotIn", "values": [name]} for name in ("n1", "n2")
    ]
    own = {"weight": 100, "preference": {"matchFields": fields}}
    assert found == {"nodeAffinity": {kind: [term, own]}, "podAntiAffinity": {}}


def test_the_default_is_the_manifest_that_was_asked_for() -> None:
    """Image, resources, probes, strategy and DEVICE_ID equal those of the design's manifest."""
    thing = made()
    agent = agent_of(thing)
    env = {one["name"]: one.get("value") for one in agent["env"]}

    assert thing["kind"] == "Deployment"
    assert thing["spec"]["replicas"] == 1
    assert thing["spec"]["strategy"] == {"type": "Recreate"}
    assert agent["image"] == "agntup/watchdog-agent"
    assert agent["resources"] == {
        "requests": {"memory": "64Mi", "cpu": "100m"},
        "limits": {"memory": "128Mi", "cpu": "200m"},
    }
    live, ready = agent["livenessProbe"], agent["readinessProbe"]
    assert (live["httpGet"], live["initialDelaySeconds"], live["periodSeconds"]) == (
        {"path": "/healthz", "port": 8080}, 5, 5,
    )  # fmt: skip
    assert (ready["httpGet"], ready["initialDelaySeconds"], ready["periodSeconds"]) == (
        {"path": "/ready", "port": 8080}, 10, 5,
    )  # fmt: skip
    assert env["DEVICE_ID"] == "device-1"
    assert thing["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 8


def test_labels_say_whose_agent_it_is() -> None:
    """Slug, class, version, epoch and shard are labels of object and pod; the raw id is an
    annotation."""
    thing = made(device="Käfig/7")
    told = thing["metadata"]["labels"]

    assert told == thing["spec"]["template"]["metadata"]["labels"]
    assert told[names.SLUG] == slug_of(DeviceId("Käfig/7"))
    assert (told[names.CLASS], told[names.VERSION], told[names.EPOCH], told[names.SHARD]) == (
        "camera", "1.0_b2", "3", "5",
    )  # fmt: skip
    assert thing["metadata"]["annotations"][names.DEVICE_ID] == "Käfig/7"


def test_the_document_is_the_agents_and_holds_no_credential() -> None:
    """The agent's document has device and epoch; its credential is not in the object (S10)."""
    spec = replace(SPEC, agent_config={"v": 1, "credential": "hunter2"})
    thing = made(spec, secret="some")
    env = {one["name"]: one.get("value") for one in agent_of(thing)["env"]}
    document = json.loads(base64.b64decode(env["WATCHDOG_CONFIG_B64"]))

    assert (document["device_id"], document["epoch"], document["v"]) == ("device-1", 3, 1)
    assert "credential" not in document
    assert env["WATCHDOG_TOKEN_FILE"] == "/var/run/watchdog/token"
    for _ in range(2):  # reading does not remove it
        assert objects.document_of(record_of("x"), Epoch(1), spec)[1] == "hunter2"


@pytest.mark.parametrize("kind", ["deployment", "statefulset", "pod"])
def test_each_workload_has_the_same_pod(kind: str) -> None:
    """A StatefulSet and a bare Pod have the same pod as the Deployment."""
    thing = made(replace(SPEC, variables={"workload": kind}))
    pod = thing["spec"] if kind == "pod" else thing["spec"]["template"]["spec"]
    usual = made()["spec"]["template"]["spec"]

    assert thing["kind"].lower() == kind
    assert pod == usual


def test_a_variable_is_a_value_and_nothing_else(tmp_path: Path) -> None:
    """A variable's text stays one string of the document, or a number where a number is
    expected."""
    spec = replace(SPEC, variables={"image": "x\nhostNetwork: true", "lost_after": "3"})
    pod = made(spec)["spec"]["template"]["spec"]

    assert pod["containers"][0]["image"] == "x\nhostNetwork: true"
    assert "hostNetwork" not in pod
    assert {one["tolerationSeconds"] for one in pod["tolerations"]} == {3}
    with pytest.raises(UserError, match="is not a whole number"):
        made(replace(SPEC, variables={"lost_after": "soon"}))


def test_device_ids_expand_to_nothing() -> None:
    """A device called $(POD_IP) gets that text as its DEVICE_ID, not the pod's address (S11)."""
    env = agent_of(made(device="$(POD_IP)"))["env"]

    assert {"name": "DEVICE_ID", "value": "$$(POD_IP)"} in env


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "Pod"}, "is not a Deployment"),
        ({"spec.replicas": 2}, "a device has one agent"),
        ({"spec.strategy": {"type": "RollingUpdate"}}, "must be Recreate"),
        ({"spec.template.spec.restartPolicy": "Never"}, "must be Always"),
        ({"spec.template.spec.containers": []}, "no container named agent"),
        ({"spec.template.spec.tolerations": []}, "five minutes"),
        ({"spec.template.spec.nodeName": "${nowhere}"}, "'nowhere' is not set"),
        ({"spec": []}, "spec is not a mapping"),
        ({"spec.strategy": "Recreate"}, "spec.strategy is not a mapping"),
        ({"spec.template": "x"}, "spec.template is not a mapping"),
        ({"spec.template": None}, "no container named agent"),
        ({"spec.template.metadata": "x"}, "template.metadata is not a mapping"),
        ({"spec.template.metadata": {"labels": ["x"]}}, "metadata.labels is not a mapping"),
        ({"spec.template.spec.containers": {"name": "agent"}}, "spec.containers is not a list"),
        ({"spec.template.spec.containers": [None]}, r"spec.containers\[0\] is not a mapping"),
        (
            {"spec.template.spec.containers": [{"name": "agent", "env": {"A": "b"}}]},
            r"\[0\].env is not a list",
        ),
        (
            {"spec.template.spec.containers": [{"name": "agent", "env": ["A=b"]}]},
            r"env\[0\] is not a mapping",
        ),
        (
            {"spec.template.spec.containers": [{"name": "agent", "volumeMounts": 5}]},
            "volumeMounts is not a list",
        ),
        ({"spec.template.spec.tolerations": ["x"]}, r"spec.tolerations\[0\] is not a mapping"),
        ({"spec.template.spec.tolerations": [{"key": []}]}, r"tolerations\[0\].key is not text"),
        ({"spec.template.spec.volumes": "x"}, "spec.volumes is not a list"),
    ],
)
def test_a_template_that_would_not_do_is_refused(
    tmp_path: Path, repository: Path, change: dict[str, Any], words: str
) -> None:
    """Each setting that would break a promise is named before anything is placed."""
    document = yaml.safe_load((repository / "jobs/kubernetes/device-watchdog.yaml").read_text())
    for path, value in change.items():
        *parents, last = path.split(".")
        place = document
        for one in parents:
            place = place[one]
        place[last] = value
    file = tmp_path / "template.yaml"
    file.write_text(yaml.safe_dump(document))
    with pytest.raises(UserError, match=words):
        objects.build(replace(SPEC, template=str(file)))


def test_what_has_no_name_is_passed_on(tmp_path: Path, repository: Path) -> None:
    """Containers and variables without a name are passed on for the API server to reject."""
    document = yaml.safe_load((repository / "jobs/kubernetes/device-watchdog.yaml").read_text())
    pod = document["spec"]["template"]["spec"]
    pod["containers"][0]["env"] = [*(pod["containers"][0].get("env") or []), {"value": "x"}]
    pod["containers"].insert(0, {"image": "x"})
    file = tmp_path / "template.yaml"
    file.write_text(yaml.safe_dump(document))
    found = made(replace(SPEC, template=str(file)))["spec"]["template"]["spec"]["containers"]

    assert found[0] == {"image": "x"}
    assert {"value": "x"} in found[1]["env"]


def test_a_variable_that_the_template_has_not_is_refused() -> None:
    """A misspelt variable is reported, with the list of existing ones."""
    with pytest.raises(
        UserError, match=r"has no variable 'imgae'; did you mean image\? it has .*image"
    ):
        objects.build(replace(SPEC, variables={"imgae": "x"}))


def test_names_are_short_enough_and_their_own() -> None:
    """Every hostile id gives a unique name of at most 52 characters."""
    slugs = [slug_of(DeviceId(one)) for one in [*hostile_device_ids(500), "m" * 40, "m" * 41]]
    found = {names.name_of(slug) for slug in slugs}

    assert len(found) == len(slugs)
    assert max(map(len, found)) <= 52
    assert all(one.strip("-") == one and "--" not in one for one in found)


def test_a_ref_is_read_back_and_nothing_else_is() -> None:
    """A placement's ref survives a round trip through text; a ref of another backend is
    rejected."""
    ref = names.Ref("n-1", "statefulset", names.name_of(Slug("a-" + "b" * 20)), Epoch(4))

    assert names.Ref.parse(str(ref)) == ref
    with pytest.raises(UserError, match="is not a placement"):
        names.Ref.parse("device-watchdog/dispatch-x")


@pytest.mark.parametrize(
    ("image", "good"),
    [
        ("agntup/watchdog-agent", False),
        ("agntup/watchdog-agent:1.0", False),
        ("agntup/watchdog-agent@sha256:" + "0" * 63, False),
        ("agntup/watchdog-agent@sha256:" + "0" * 64 + ":1.0", False),
        ("agntup/watchdog-agent@sha256:" + "0a" * 32, True),
        ("registry.example:5000/agent:1.0@sha256:" + "0a" * 32, True),
    ],
)
def test_h15_only_an_image_with_a_digest_is_verified(image: str, good: bool) -> None:
    """The pod names the image with its digest, which the container runtime verifies; an image
    without a digest is reported."""
    spec = replace(SPEC, variables={"image": image})
    assert agent_of(made(spec))["image"] == image
    assert objects.unverified_image(objects.build(spec)) == ("" if good else image)

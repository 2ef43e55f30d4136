"""What the kubelet stand-in provides to a pod, where the control plane's own pods depend on it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from nomad_watchdog.clients.kubernetes import KubernetesClient
from servers.kubelet.__main__ import Kubelet
from servers.kubelet.spec import Image
from servers.kubernetes import KubernetesCluster
from tests.schedulers.kubernetes.hosted import ACCOUNT, until

SPACE = "/api/v1/namespaces/stand-in"
PROGRAM = """
import json, os, pathlib, sys, time
account = pathlib.Path(os.environ["ACCOUNT"])
said = {name: (account / name).read_text() for name in ("token", "namespace", "ca.crt")}
said |= {"config": pathlib.Path(sys.argv[1]).read_text()}
said |= {name: os.environ[name] for name in ("KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT")}
print(json.dumps(said), flush=True)
time.sleep(600)
"""
POD: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "given"},
    "spec": {
        "terminationGracePeriodSeconds": 1,
        "containers": [
            {
                "name": "reader",
                "image": "test/reader",
                "args": ["/etc/thing/one.txt"],
                "env": [{"name": "ACCOUNT", "value": ACCOUNT}],
                "volumeMounts": [
                    {"name": "config", "mountPath": "/etc/thing/one.txt", "subPath": "one.txt"}
                ],
            }
        ],
        "volumes": [{"name": "config", "configMap": {"name": "later"}}],
    },
}


@pytest.mark.asyncio(loop_scope="session")
async def test_a_pod_waits_for_its_config_map_and_gets_the_token_of_its_account(
    kube: KubernetesCluster, admin: KubernetesClient, tmp_path: Path
) -> None:
    """Without the ConfigMap the container waits and reports that as the reason; then it reads the
    file and a token, which the API server confirms as its service account's, bound to the pod."""
    await kube.add_namespace("stand-in")
    image = Image((sys.executable, "-S", "-E", "-c", PROGRAM))
    options: dict[str, Any] = {"node": "stand-in", "subnet": 29, "backoff_s": 0.2}
    async with Kubelet(kube.kubeconfig, tmp_path, images={"test/reader": image}, **options):
        await admin.create(f"{SPACE}/pods", POD)

        async def waits() -> str:
            status = (await admin.get(f"{SPACE}/pods/given"))["status"]
            (told,) = status.get("containerStatuses") or [{}]
            return str(told.get("state", {}).get("waiting", {}).get("message", ""))

        assert await until(waits, "a reason to wait") == 'configmap "later" not found'
        await admin.create(
            f"{SPACE}/configmaps", {"metadata": {"name": "later"}, "data": {"one.txt": "thing 1"}}
        )

        async def printed() -> dict[str, str]:
            (file,) = tmp_path.glob("*/reader.log")
            return dict(json.loads(file.read_text())) if file.read_text() else {}

        async def begun() -> bool:
            return bool(list(tmp_path.glob("*/reader.log")))

        await until(begun, "its start")
        said = await until(printed, "what it reads")
        body = {"spec": {"token": said["token"]}}
        review = await admin.create("/apis/authentication.k8s.io/v1/tokenreviews", body)
        user = review["status"]["user"]
        await admin.delete(f"{SPACE}/pods/given")

        async def gone() -> bool:
            return await admin.find(f"{SPACE}/pods/given") is None

        await until(gone, "its end")

    assert (said["config"], said["namespace"]) == ("thing 1", "stand-in")
    assert kube.server == "https://{KUBERNETES_SERVICE_HOST}:{KUBERNETES_SERVICE_PORT}".format(
        **said
    )
    assert "BEGIN CERTIFICATE" in said["ca.crt"]
    assert user["username"] == "system:serviceaccount:stand-in:default"
    assert user["extra"]["authentication.kubernetes.io/pod-name"] == ["given"]

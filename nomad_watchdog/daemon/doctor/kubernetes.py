"""Checks of Kubernetes."""

from __future__ import annotations

import asyncio
import re
from typing import Final

from nomad_watchdog.clients.kubernetes import KubernetesClient
from nomad_watchdog.config.settings import Settings
from nomad_watchdog.daemon.doctor.base import Check, CheckStatus
from nomad_watchdog.daemon.factory import kubernetes_settings
from nomad_watchdog.errors import DeniedError, NotFoundError, UserError
from nomad_watchdog.schedulers.kubernetes import names, objects
from nomad_watchdog.schedulers.kubernetes.namespaces import known_namespaces

KUBERNETES_MINIMUM: Final = (1, 34)
_ALL: Final = ("get", "list", "watch", "create", "patch", "delete")
KUBERNETES_RIGHTS: Final = (
    ("apps", "deployments", _ALL),
    ("apps", "statefulsets", _ALL),
    ("", "pods", _ALL),
    ("", "pods/log", ("get",)),
    ("", "secrets", ("create", "patch", "delete")),
    ("policy", "poddisruptionbudgets", ("get", "create", "patch")),
)
_RECORD_RIGHTS: Final = (("create", ""), ("get", names.RECORD), ("patch", names.RECORD))
"""Verb and name, for the ConfigMap in the first namespace that contains the number of namespaces."""


async def check_kubernetes(settings: Settings) -> list[Check]:
    client = KubernetesClient(kubernetes_settings(settings))
    try:
        version = str((await client.get("/version")).get("gitVersion", "?"))
        found = tuple(int(part) for part in re.findall(r"[0-9]{1,9}", version)[:2])
        good = found >= KUBERNETES_MINIMUM
        fix = "" if good else "upgrade the control plane to 1.34 or later"
        status = CheckStatus.OK if good else CheckStatus.WARN
        checks = [
            Check(
                "kubernetes api",
                CheckStatus.OK,
                f"{client.settings.server}, {client.settings.source}",
            ),
            Check("kubernetes version", status, version, fix),
        ]
        first, spread = settings.kubernetes.namespace, settings.kubernetes.namespaces
        try:
            known = await known_namespaces(client, first, spread)
        except DeniedError:
            known = spread  # the checks of the namespaces report the missing rights
        for number in range(known):
            space = names.namespace_of(first, number)
            checks += await _kubernetes_namespace(client, space, first=number == 0)
        nodes = await _kubernetes_nodes(client, leave=settings.kubernetes.leave_cordoned)
        return [*checks, nodes, *_kubernetes_images(settings)]
    finally:
        await client.close()


def _kubernetes_images(settings: Settings) -> list[Check]:
    """Whether the image of each class has a digest, which the container runtime verifies."""
    checks = []
    for name, spec in settings.readable_specs()[0].items():
        try:
            image = objects.unverified_image(objects.build(settings.spec_on("kubernetes", spec)))
        except UserError as error:
            fix = f'fix agent_class "{name}"; until then its devices get no agent'
            checks.append(Check(f"class {name}", CheckStatus.FAIL, str(error), fix))
            continue
        what = f"{image!a} has no digest, so nothing verifies which agent runs"
        fix = "set the variable image to NAME@sha256:..."
        checks.append(
            Check(f"image of class {name}", CheckStatus.WARN, what, fix)
            if image
            else Check(f"image of class {name}", CheckStatus.OK, "verified by its digest")
        )
    return checks


async def _kubernetes_namespace(
    client: KubernetesClient, namespace: str, *, first: bool
) -> list[Check]:
    name = f"kubernetes namespace {namespace}"
    try:
        await client.get(f"/api/v1/namespaces/{namespace}")
        there = Check(name, CheckStatus.OK, "exists")
    except NotFoundError:
        return [
            Check(name, CheckStatus.FAIL, "does not exist", f"kubectl create namespace {namespace}")
        ]
    except DeniedError:
        fix = "grant get on namespaces; jobs/kubernetes/rbac.yaml has all rights"
        there = Check(name, CheckStatus.WARN, "can't be read", fix)
    return [there, await _kubernetes_rights(client, namespace, first=first)]


async def _kubernetes_rights(client: KubernetesClient, namespace: str, *, first: bool) -> Check:
    name = f"kubernetes rights in {namespace}"
    questions = [
        (verb, group, resource, "")
        for group, resource, verbs in KUBERNETES_RIGHTS
        for verb in verbs
    ]
    if first:
        questions += [(verb, "", "configmaps", record) for verb, record in _RECORD_RIGHTS]
    answers = await asyncio.gather(
        *(
            _kubernetes_allows(client, namespace, group, resource, verb, only)
            for verb, group, resource, only in questions
        )
    )
    missing = [
        f"{verb} {resource}" + (f"/{only}" if only else "")
        for (verb, _, resource, only), allowed in zip(questions, answers, strict=True)
        if not allowed
    ]
    if not missing:
        return Check(name, CheckStatus.OK, "all required rights")
    fix = f"grant {', '.join(missing)} in {namespace}; jobs/kubernetes/rbac.yaml has all"
    found = f"lacks {', '.join(missing)}"
    if all(one.endswith(" poddisruptionbudgets") for one in missing):
        cost = 'a drain evicts all bare pods of a node at once (workload = "pod")'
        return Check(name, CheckStatus.WARN, f"{found}: {cost}", fix)
    return Check(name, CheckStatus.FAIL, found, fix)


async def _kubernetes_nodes(client: KubernetesClient, *, leave: bool) -> Check:
    """Whether cordoned nodes can be read. `leave`: whether agents are to leave them."""
    verbs = ("list", "watch")
    answers = [await _kubernetes_allows(client, "", "", "nodes", verb, "") for verb in verbs]
    missing = [verb for verb, allowed in zip(verbs, answers, strict=True) if not allowed]
    if not missing:
        return Check("kubernetes nodes", CheckStatus.OK, "can be listed and watched")
    found = f"lacks {', '.join(missing)} on nodes: cordoned nodes are not reported"
    found += ", and no agent leaves them (kubernetes.leave_cordoned)" if leave else ""
    fix = "apply the ClusterRole of jobs/kubernetes/rbac.yaml (chart: rbac.nodes)"
    return Check("kubernetes nodes", CheckStatus.WARN, found, fix)


async def _kubernetes_allows(  # the parts of one question
    client: KubernetesClient, namespace: str, group: str, resource: str, verb: str, only: str
) -> bool:
    kind, _, below = resource.partition("/")
    attributes = {"namespace": namespace, "group": group, "resource": kind, "verb": verb}
    attributes |= {"subresource": below} if below else {}
    attributes |= {"name": only} if only else {}
    # Every user may check their own rights, which changes nothing.
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": attributes},
    }
    answer = await client.create("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review)
    return bool((answer.get("status") or {}).get("allowed"))

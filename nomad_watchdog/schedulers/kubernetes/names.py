"""What our objects are called and marked with. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from nomad_watchdog.errors import UserError
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import Epoch

Kind = Literal["deployment", "statefulset", "pod"]
KINDS: Final[tuple[Kind, ...]] = ("deployment", "statefulset", "pod")

DOMAIN: Final = "nomad-watchdog"
SLUG: Final = f"{DOMAIN}/slug"
EPOCH: Final = f"{DOMAIN}/epoch"
CLASS: Final = f"{DOMAIN}/class"
VERSION: Final = f"{DOMAIN}/version"
SHARD: Final = f"{DOMAIN}/shard"
INSTALLATION: Final = f"{DOMAIN}/installation"
WORKLOAD: Final = f"{DOMAIN}/workload"
DEVICE_ID: Final = f"{DOMAIN}/device-id"
"""An annotation, as the hash of the spec is: a label's value may not hold every text."""
SPEC_HASH: Final = f"{DOMAIN}/spec-hash"
API: Final = f"{DOMAIN}/api"
"""An annotation: the addresses that the agent reports to, separated by spaces."""
MANAGED: Final = "app.kubernetes.io/managed-by"
APP: Final = "app.kubernetes.io/name"
AGENT: Final = "watchdog-agent"

RECORD: Final = "nomad-watchdog"
"""ConfigMap in the first namespace that remembers how many there are."""

_NAME_MOST: Final = 52
"""A StatefulSet's name and the hash of its revision make a label of at most 63 characters."""
_HASH: Final = 21
"""The end of a slug: a dash and 20 characters of hash."""
_LABEL: Final = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")
_NAMESPACE: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,56}[a-z0-9])?")
_PATHS: Final[dict[Kind, tuple[str, str]]] = {
    "deployment": ("/apis/apps/v1", "deployments"),
    "statefulset": ("/apis/apps/v1", "statefulsets"),
    "pod": ("/api/v1", "pods"),
}


def name_of(slug: Slug) -> str:
    """The name of a device's object: its slug, of which the readable part gives way if it is too long."""
    return (
        slug if len(slug) <= _NAME_MOST else slug[: _NAME_MOST - _HASH].rstrip("-") + slug[-_HASH:]
    )


def collection(namespace: str, kind: Kind) -> str:
    """The path of a list."""
    group, plural = _PATHS[kind]
    return f"{group}/namespaces/{namespace}/{plural}"


def label(value: str, what: str) -> str:
    """Raises UserError when Kubernetes does not take it as a label's value."""
    if not _LABEL.fullmatch(value):
        raise UserError(
            f"{what} {value!r} can't be a label: allowed are letters, digits, . _ and -, at most 63"
        )
    return value


def version_label(version: str) -> str:
    """As Helm does it: the plus of a build is no character of a label."""
    return label(version.replace("+", "_").strip("._-")[:63].rstrip("._-"), "version")


def namespace_of(first: str, number: int) -> str:
    """Name of the namespace with this number: the first as configured, then with -1, -2, …"""
    return first if number == 0 else f"{first}-{number}"


def record_path(first: str) -> str:
    return f"/api/v1/namespaces/{first}/configmaps/{RECORD}"


def check_namespace(name: str) -> str:
    """Raises UserError for a name that Kubernetes does not take with a number behind it."""
    if not _NAMESPACE.fullmatch(name):
        raise UserError(f"kubernetes namespace {name!r}: allowed are a-z, 0-9 and -, at most 58")
    return name


@dataclass(frozen=True, slots=True)
class Ref:
    """One placement's handle: an object, and the epoch that it is meant at."""

    namespace: str
    kind: Kind
    name: str
    epoch: Epoch

    def __str__(self) -> str:
        return f"{self.namespace}/{self.kind}/{self.name}#{self.epoch}"

    @property
    def path(self) -> str:
        return f"{collection(self.namespace, self.kind)}/{self.name}"

    @classmethod
    def parse(cls, text: str) -> Ref:
        """Raises UserError when it is none of ours."""
        found = re.fullmatch(r"([a-z0-9-]+)/(deployment|statefulset|pod)/([a-z0-9-]+)#(\d+)", text)
        if found is None:
            raise UserError(f"{text!r} is no placement of the kubernetes backend")
        kind = next(one for one in KINDS if one == found[2])
        return cls(found[1], kind, found[3], Epoch(int(found[4])))

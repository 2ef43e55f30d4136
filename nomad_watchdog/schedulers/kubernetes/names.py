"""Names, labels and annotations of the objects. Pure."""

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
"""An annotation, like the hash of the spec: the value of a label may not contain every character."""
SPEC_HASH: Final = f"{DOMAIN}/spec-hash"
API: Final = f"{DOMAIN}/api"
"""An annotation: the addresses that the agent reports to, separated by spaces."""
MANAGED: Final = "app.kubernetes.io/managed-by"
APP: Final = "app.kubernetes.io/name"
AGENT: Final = "watchdog-agent"

RECORD: Final = "nomad-watchdog"
"""ConfigMap in the first namespace that stores the number of namespaces."""

_NAME_MAX: Final = 52
"""The name of a StatefulSet and the hash of its revision form a label of at most 63 characters."""
_HASH: Final = 21
"""Length of the end of a slug: a dash and 20 characters of hash."""
_LABEL: Final = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")
_NAMESPACE: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,56}[a-z0-9])?")
_PATHS: Final[dict[Kind, tuple[str, str]]] = {
    "deployment": ("/apis/apps/v1", "deployments"),
    "statefulset": ("/apis/apps/v1", "statefulsets"),
    "pod": ("/api/v1", "pods"),
}


def name_of(slug: Slug) -> str:
    """The name of a device's object: its slug. If that is too long, its readable part is cut."""
    return slug if len(slug) <= _NAME_MAX else slug[: _NAME_MAX - _HASH].rstrip("-") + slug[-_HASH:]


def collection(namespace: str, kind: Kind) -> str:
    """The path of a list."""
    group, plural = _PATHS[kind]
    return f"{group}/namespaces/{namespace}/{plural}"


def label(value: str, what: str) -> str:
    """`value`, checked as the value of a label. Raises UserError. `what`: its name in the error."""
    if not _LABEL.fullmatch(value):
        raise UserError(
            f"{what} {value!r} is not valid as a label: allowed are letters, digits, . _ and -, at most 63"
            " characters"
        )
    return value


def version_label(version: str) -> str:
    """A version as a label, as Helm converts it: a label may not contain the plus sign of a build."""
    return label(version.replace("+", "_").strip("._-")[:63].rstrip("._-"), "version")


def namespace_of(first: str, number: int) -> str:
    """Name of the namespace with this number: the first as configured, then with -1, -2, …"""
    return first if number == 0 else f"{first}-{number}"


def record_path(first: str) -> str:
    return f"/api/v1/namespaces/{first}/configmaps/{RECORD}"


def check_namespace(name: str) -> str:
    """`name`, checked: it must be valid with a number appended. Raises UserError."""
    if not _NAMESPACE.fullmatch(name):
        raise UserError(
            f"kubernetes namespace {name!r}: allowed are a-z, 0-9 and -, at most 58 characters"
        )
    return name


@dataclass(frozen=True, slots=True)
class Ref:
    """The reference of a placement: an object and an epoch."""

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
        """Raises UserError when the text is not a reference of this backend."""
        found = re.fullmatch(
            r"([a-z0-9-]+)/(deployment|statefulset|pod)/([a-z0-9-]+)#([0-9]{1,18})", text
        )
        if found is None:
            raise UserError(f"{text[:200]!a} is not a placement of the kubernetes backend")
        kind = next(one for one in KINDS if one == found[2])
        return cls(found[1], kind, found[3], Epoch(int(found[4])))

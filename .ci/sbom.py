"""The software bill of materials of what is shipped, as CycloneDX 1.6 in JSON: `make sbom`.

Made of files of this repository alone, so that the same commit gives the same bytes everywhere:
the lock of the runtime (versions, hashes, and who needs whom), and the base of the images.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / ".ci" / "lock"


@dataclass(frozen=True, slots=True)
class Locked:
    """One package of a lock."""

    name: str
    version: str
    marker: str
    hashes: tuple[str, ...]
    """SHA-256 of each file that may be installed: one for each platform, and the source."""
    needed_by: tuple[str, ...]

    @property
    def purl(self) -> str:
        return f"pkg:pypi/{self.name}@{self.version}"


def locked(lock: Path) -> Iterator[Locked]:
    """The packages of a lock. Raises ValueError at a line that is not part of an exact, hashed one."""
    for block in re.split(r"\n(?=\S)", lock.read_text().strip()):
        wanted, *rest = block.replace("\\\n", "\n").splitlines()
        exact = re.fullmatch(r"([a-z0-9-]+)==([^\s;]+)(?:\s*;\s*(.+?))?\s*", wanted)
        hashes = [
            one.removeprefix("--hash=sha256:") for line in rest if (one := line.strip())[0] == "-"
        ]
        notes = "".join(line for line in rest if line.strip().startswith("#"))
        if (
            exact is None
            or not hashes
            or not all(re.fullmatch("[0-9a-f]{64}", one) for one in hashes)
        ):
            raise ValueError(f"{lock}: not an exact version with hashes: {wanted}")
        needed_by = [word for word in re.findall(r"[\w.()-]+", notes) if word != "via"]
        yield Locked(exact[1], exact[2], exact[3] or "", tuple(hashes), tuple(needed_by))


def base_image() -> dict[str, Any]:
    """What the images are built on: jobs/Dockerfile and agent/Dockerfile name the same."""
    name, version, digest = _BASE.findall((ROOT / "jobs" / "Dockerfile").read_text())[0]
    purl = (
        f"pkg:docker/library/{name.rpartition('/')[2]}@{digest.replace(':', '%3A')}?tag={version}"
    )
    content = {"alg": "SHA-256", "content": digest.removeprefix("sha256:")}
    return {
        "type": "container",
        "bom-ref": purl,
        "name": name,
        "version": version,
        "purl": purl,
        "hashes": [content],
    }


_BASE = re.compile(r"^ARG BASE=([^:@\s]+):([^@\s]+)@(sha256:[0-9a-f]{64})$", re.MULTILINE)


def bill() -> dict[str, Any]:
    """The whole document."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = list(locked(LOCK / "run.txt"))
    image = base_image()
    us = f"pkg:pypi/{project['name']}@{project['version']}"
    needs: dict[str, list[str]] = {us: [image["bom-ref"]], image["bom-ref"]: []}
    by_name = {one.name: one.purl for one in packages} | {project["name"]: us}
    for one in packages:
        needs.setdefault(one.purl, [])
        for name in one.needed_by:
            if name in by_name:
                needs.setdefault(by_name[name], []).append(one.purl)
    components = [image, *(_component(one) for one in packages)]
    metadata: dict[str, Any] = {"component": {
        "type": "application", "bom-ref": us, "name": project["name"], "version": project["version"],
        "purl": us, "licenses": [{"license": {"id": project["license"]}}],
    }}  # fmt: skip
    if epoch := os.environ.get("SOURCE_DATE_EPOCH"):
        metadata["timestamp"] = datetime.fromtimestamp(int(epoch), UTC).isoformat()
    content = {
        "metadata": metadata,
        "components": components,
        "dependencies": [
            {"ref": ref, "dependsOn": sorted(on)} for ref, on in sorted(needs.items())
        ],
    }
    serial = uuid.uuid5(uuid.NAMESPACE_URL, us + json.dumps(content, sort_keys=True))
    head = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
    }
    return head | content


def _component(one: Locked) -> dict[str, Any]:
    found: dict[str, Any] = {
        "type": "library", "bom-ref": one.purl, "name": one.name, "version": one.version, "purl": one.purl,
        "hashes": [{"alg": "SHA-256", "content": digest} for digest in one.hashes],
    }  # fmt: skip
    if one.marker:
        found["properties"] = [{"name": "python:marker", "value": one.marker}]
    return found


if __name__ == "__main__":
    print(json.dumps(bill(), indent=2))

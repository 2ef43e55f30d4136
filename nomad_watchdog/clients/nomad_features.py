"""Features of the Nomad servers, by their version.

Only this module knows which version introduced a feature. Callers use `NomadFeatures.has`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from nomad_watchdog.clients.nomad_rows import Job, Task, TaskGroup

Version = tuple[int, ...]

MINIMUM: Final[Version] = (1, 6, 0)
"""The oldest Nomad that is supported. Earlier ones have no node pools."""
_NUMBER: Final = re.compile(r"([0-9]{1,9})\.([0-9]{1,9})(?:\.([0-9]{1,9}))?")

PROBE: Final = 'job "probe" {\n group "g" {\n  task "t" { driver = "raw_exec" }\n }\n}'
"""A job that is only parsed: the fields of the result show the minimum age of the parser. HCL does not allow a block
within a block of one line."""


class Feature(Enum):
    """A feature: the first version that has it, its name, and the effect of its absence, for operators."""

    DISCONNECT = (
        (1, 8, 0),
        "block `disconnect`",
        "a lost node keeps its agent because rescheduling is off, so only the control plane restarts a failed one",
    )
    NUMERIC_PAGES = (
        # fixed earlier (GH-25792); 1.11 is the first version that was tested
        (1, 11, 0),
        "paged lists of allocations and evaluations",
        "they are read in one response, about 2.4 KB per agent",
    )
    ATOMIC_DISPATCH = (
        (1, 10, 5),  # GH-26710
        "dispatch as one write",
        "a server crash can leave a job that no scheduler evaluates; the control plane evaluates it",
    )
    RACE_SAFE_TOKENS = (
        (1, 11, 2),  # GH-27353
        "idempotency tokens that are safe against races",
        "racing requests can start an agent twice; the control plane stops all but the oldest, and accepts only one",
    )

    def __init__(self, since: Version, title: str, without: str) -> None:
        self.since = since
        self.title = title
        self.without = without


@dataclass(frozen=True, slots=True)
class NomadFeatures:
    """`version`: that of the oldest server. `exact`: False when it is only a lower bound."""

    version: Version = MINIMUM
    exact: bool = False

    def has(self, feature: Feature) -> bool:
        """Whether every server certainly has it."""
        return self.version >= feature.since

    def missing(self) -> list[Feature]:
        """Features that the servers lack or may lack, in the order of `Feature`."""
        return [feature for feature in Feature if not self.has(feature)]

    def __str__(self) -> str:
        text = ".".join(map(str, self.version))
        return text if self.exact else f"{text} or later"


def of_members(answer: object) -> NomadFeatures | None:
    """From Nomad's ``/v1/agent/members``; None when it has no server with a version.

    During an upgrade of the servers the oldest one counts, because any of them can become the leader."""
    members = answer.get("Members") if isinstance(answer, Mapping) else None
    rows = members if isinstance(members, list) else []
    tags = [row.get("Tags") for row in rows if isinstance(row, Mapping)]
    found = versions(str(tag.get("build", "")) for tag in tags if isinstance(tag, Mapping))
    return NomadFeatures(min(found), exact=True) if found else None


def of_parsed(job: Job) -> NomadFeatures:
    """From the result of parsing `PROBE`, for a token that may not read the members."""
    group = next(iter(job.get("TaskGroups") or []), TaskGroup())
    task = next(iter(group.get("Tasks") or []), Task())
    if "Secrets" in task:
        return NomadFeatures((1, 11, 0))
    return NomadFeatures((1, 8, 0) if "Disconnect" in group else MINIMUM)


def versions(texts: Iterable[str]) -> list[Version]:
    """Version numbers in texts such as ``1.6.3`` or ``v1.11.3+ent``; texts without one are left out."""
    matches = (_NUMBER.search(text) for text in texts)
    return [tuple(int(part or 0) for part in match.groups()) for match in matches if match]

"""The rights of each role at the API, in one table.

A route requires a right; a token has a role. A caller without a role has no rights; public routes require none.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final


class Role(StrEnum):
    """What a token is for."""

    VIEWER = "viewer"
    DEVICE = "device"
    AGENT = "agent"
    OPERATOR = "operator"


class Right(StrEnum):
    """What a route requires."""

    READ = "read"
    CHANGE = "change"
    """Register and remove devices, and send their heartbeats."""
    REPORT = "report"
    """Report as the agent of a device."""
    OPERATE = "operate"
    """Override the reconciler, and everything that no other right covers."""


RIGHTS: Final[Mapping[Role, frozenset[Right]]] = {
    Role.VIEWER: frozenset({Right.READ}),
    Role.DEVICE: frozenset({Right.CHANGE}),
    Role.AGENT: frozenset({Right.REPORT}),
    Role.OPERATOR: frozenset(Right),
}


def may(role: Role, right: Right) -> bool:
    """Whether this role has this right."""
    return right in RIGHTS[role]


def roles_with(right: Right) -> tuple[Role, ...]:
    """The roles that have this right, least privileged first."""
    return tuple(role for role in Role if may(role, right))

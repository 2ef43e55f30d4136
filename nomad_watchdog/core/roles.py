"""Who may do what at the API's door: one table.

A right is what a route asks for; a role is what a token was given. Whoever has no role has the rights of
nobody, which are none: a public route asks for no right.
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
    """What a route asks for."""

    READ = "read"
    CHANGE = "change"
    """Say that devices come, go or live."""
    REPORT = "report"
    """Speak as the agent of a device."""
    OPERATE = "operate"
    """Overrule the reconciler, and whatever else no other right covers."""


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
    """The roles that have this right, the least mighty first."""
    return tuple(role for role in Role if may(role, right))

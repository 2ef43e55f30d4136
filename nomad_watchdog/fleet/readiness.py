"""Whether this control plane knows enough to decide, and whether its registry works."""

from __future__ import annotations

import asyncio


class FleetReadiness:
    """Ready: the registry and the scheduler have been read, and the registry can be read and written."""

    def __init__(self) -> None:
        self.event = asyncio.Event()
        """Set when both sides have been read."""
        self.waits_for = "the registry and the scheduler have not been read yet"
        """Why they have not been read; "" = they have."""
        self.registry_gone = ""
        """Why there is no registry any more: it was wiped or replaced while the service was running. "" = it is
        there. The last known records remain valid, and running agents continue."""
        self.registry_problem = ""
        """Why the registry cannot be read now; "" = it can. The last known records remain valid."""
        self.registry_unreadable = False
        """The registry cannot be read until an operator fixes something, such as the token's permissions."""
        self.registry_unwritable = ""
        """Why the registry cannot be written until an operator fixes something; "" = it can."""

    @property
    def ready(self) -> bool:
        """Whether decisions and answers rest on known facts and can be carried out."""
        return self.event.is_set() and not (
            self.registry_gone or self.registry_unreadable or self.registry_unwritable
        )

    @property
    def reason(self) -> str:
        """Why this is not ready, or what is wrong with the registry; "" = nothing."""
        return (
            self.registry_gone
            or self.registry_problem
            or self.registry_unwritable
            or self.waits_for
        )

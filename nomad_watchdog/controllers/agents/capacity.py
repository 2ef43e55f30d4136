"""Whether the scheduler has room for more agents."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from nomad_watchdog.core.actions import Action, ActionKind
from nomad_watchdog.errors import WatchdogError
from nomad_watchdog.schedulers import Scheduler

log = logging.getLogger(__name__)


class CapacityMonitor:
    """What the scheduler last reported."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.no_room = ""
        """Why no agent can be started now; "" = there is room."""
        self.full: Mapping[str, str] = {}
        """Schedulers without room, and why."""

    def is_short(self) -> bool:
        """Whether a scheduler has no room."""
        return bool(self.no_room or self.full)

    def blocks(self, action: Action) -> bool:
        """Whether this action is a start for which there is no room."""
        return action.kind is ActionKind.START and bool(self.no_room or action.home in self.full)

    async def read(self) -> bool:
        """Read it again; whether there is room where there was none. A failed read changes nothing."""
        try:
            found = await self._scheduler.capacity()
        except WatchdogError as error:
            log.warning("capacity unknown", extra={"reason": str(error)})
            return False
        freed = bool(self.full.keys() - found.full.keys())
        self.full = found.full
        was, self.no_room = self.no_room, "" if found.room else found.reason
        if self.no_room and not was:
            log.warning("starts held back", extra={"reason": found.reason})
        return freed or bool(was and not self.no_room)

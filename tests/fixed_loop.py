"""A reconcile loop that does nothing and returns what the test sets."""

from __future__ import annotations

from collections.abc import Callable

from nomad_watchdog.fleet.reconcile_loop import NoLoop
from nomad_watchdog.ids import Slug


class FixedLoop(NoLoop):
    """`obstacle` and `plan` return the results of these functions."""

    def __init__(
        self,
        *,
        obstacle: Callable[[Slug], str] | None = None,
        plan: Callable[[], dict[str, object]] | None = None,
    ) -> None:
        self._obstacle, self._plan = obstacle, plan

    def obstacle(self, slug: Slug, /) -> str:
        """As given."""
        return "" if self._obstacle is None else self._obstacle(slug)

    def plan(self) -> dict[str, object]:
        """As given."""
        return {} if self._plan is None else self._plan()

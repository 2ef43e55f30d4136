"""Devices whose agents run a spec that is not proven yet, in a roll-out in steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

from nomad_watchdog.ids import Slug
from nomad_watchdog.model import VerdictState

SUSPENDED: Final = frozenset({VerdictState.OFFLINE, VerdictState.DEGRADED})
"""Verdicts that are counted with the roll-out while its step has not passed."""


class TrialDevices:
    """What the roll-outs say of devices. Changed by them only."""

    def __init__(self) -> None:
        self.rollouts: Mapping[Slug, str] = {}
        """Device that was well before its agent got the spec on trial → the roll-out, in words."""
        self.without_repairs: frozenset[Slug] = frozenset()
        """Devices that their agents must not repair."""

    def of(self, slug: Slug) -> str:
        """The roll-out that an outage of this device counts with, in words; "" = it counts as any other."""
        return self.rollouts.get(slug, "")

    def outages(self, states: Iterable[tuple[Slug, VerdictState | None]]) -> Counter[VerdictState]:
        """Of these devices and their verdicts: the outages that count with a roll-out."""
        return Counter(
            state
            for slug, state in states
            if state is not None and state in SUSPENDED and slug in self.rollouts
        )

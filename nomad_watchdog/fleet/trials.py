"""Devices whose agents run a spec that is not proven yet, in a roll-out in steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

from nomad_watchdog.ids import Slug
from nomad_watchdog.model import Epoch, Placement, VerdictState

SUSPENDED: Final = frozenset({VerdictState.OFFLINE, VerdictState.DEGRADED})
"""Verdicts that are counted with the roll-out while its step has not passed."""


class TrialDevices:
    """What the roll-outs say of devices. Changed by them only."""

    def __init__(self) -> None:
        self.rollouts: Mapping[Slug, str] = {}
        """Device that was well before its agent got the spec on trial → the roll-out, in words."""
        self.unrepaired: Mapping[Slug, str] = {}
        """Device that must not be repaired by an agent of the spec on trial → the hash of that spec."""

    def of(self, slug: Slug) -> str:
        """The roll-out that an outage of this device counts with, in words; "" = it counts as any other."""
        return self.rollouts.get(slug, "")

    def holds_repairs(self, slug: Slug, epoch: Epoch, placements: Iterable[Placement]) -> bool:
        """Whether the agent of this epoch must not repair its device. In doubt it must not: an agent may report before
        its scheduler lists it. `placements`: of the device."""
        trial = self.unrepaired.get(slug)
        return trial is not None and not any(
            one.epoch == epoch and one.spec_hash != trial for one in placements
        )

    def outages(self, states: Iterable[tuple[Slug, VerdictState | None]]) -> Counter[VerdictState]:
        """Of these devices and their verdicts: the outages that count with a roll-out."""
        return Counter(
            state
            for slug, state in states
            if state is not None and state in SUSPENDED and slug in self.rollouts
        )

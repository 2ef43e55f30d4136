"""What the agents should be: the input of the planner besides what there is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from nomad_watchdog.core.migration import NEVER_MIGRATED, BackendAssignment
from nomad_watchdog.core.moves import NONE_REQUESTED, Requested
from nomad_watchdog.core.report_addresses import UNKNOWN, Reachability
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import DeviceRecord, Placement

Changes = Callable[[str, str], str]


def no_words(_agent_class: str, _spec_hash: str) -> str:
    """Default for `Goals.changes`: no change is known in words."""
    return ""


Stalled = Callable[[Placement], str]
"""Why a waiting placement is given up, in words; "" = it is not."""


def none_stalled(_placement: Placement) -> str:
    """Default for `Goals.stalled`: no placement is given up."""
    return ""


_NOBODY: Final[Mapping[Slug, str]] = {}


@dataclass(frozen=True, slots=True)
class Goals:
    """What each device's agent should be, in one pass."""

    spec_hashes: Mapping[str, str]
    """Agent class → hash that its agents should have; devices of other classes are left as they are."""
    trials: Mapping[Slug, str] = field(default_factory=lambda: _NOBODY)
    """Devices that have their turn in a roll-out → hash of the spec that is on trial."""
    given_up: frozenset[str] = frozenset()
    """Hashes of specs that were given up: their agents are replaced before others."""
    homes: BackendAssignment = NEVER_MIGRATED
    """On which scheduler agents are and should be."""
    changes: Changes = no_words
    """(agent class, spec hash) → what the current spec of the class changes in that spec, in words."""
    stalled: Stalled = none_stalled
    reach: Reachability = UNKNOWN
    """See `report_addresses.stranded`."""
    requested: Requested = field(default_factory=lambda: NONE_REQUESTED)
    """Placements that are to be left."""

    def spec_hash(self, record: DeviceRecord) -> str | None:
        """The hash that the agent of this device should have; None = its class is not configured."""
        return self.trials.get(record.slug) or self.spec_hashes.get(record.device.agent_class)

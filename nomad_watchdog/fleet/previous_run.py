"""What the last run of this control plane published about devices, until this run knows better."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from nomad_watchdog.core import verdict
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import DeviceRecord, VerdictState, WallTime

_NEVER_READY: Final = (VerdictState.STARTING.value, VerdictState.DEPARTED.value)


@dataclass(frozen=True, slots=True)
class PublishedVerdict:
    """The last verdict event of a device."""

    state: str
    """As in the event; a newer version may have published a state that this one does not know."""
    at: WallTime


class PreviousRun:
    """The last verdict events of devices that have no conclusive verdict in this run yet."""

    def __init__(self) -> None:
        self._published: dict[Slug, PublishedVerdict] = {}

    def restore(self, verdicts: Iterable[tuple[Slug, str, float]]) -> None:
        """Take the last verdict event of each device: slug, kind and Unix seconds."""
        self._published = {
            slug: PublishedVerdict(kind.partition(".")[2], WallTime(at))
            for slug, kind, at in verdicts
        }

    def of(self, slug: Slug) -> PublishedVerdict | None:
        """The last verdict event of a device; None = there is none, or this run knows better."""
        return self._published.get(slug)

    def was_watched(self, slug: Slug) -> bool:
        """Whether an agent of the device had been ready."""
        published = self.of(slug)
        return published is not None and published.state not in _NEVER_READY

    def carried(self, record: DeviceRecord) -> VerdictState | None:
        """The verdict about an agent that had reported to the last run with this epoch, if it may be continued."""
        published = self.of(record.slug)
        if published is None or not record.instance:
            return None
        return next((state for state in verdict.CARRIED if state.value == published.state), None)

    def forget(self, slug: Slug) -> None:
        """Forget a device that this run knows better, or that is gone."""
        self._published.pop(slug, None)

"""Which agents' reports the API refused lately, so that a silent agent has a reason in words. Bounded, in memory.

Nothing here is verified: whoever is refused names the device, or nobody does and only the address is known. So it
explains a silence and never makes one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, TypeVar

from nomad_watchdog.ids import Slug
from nomad_watchdog.model import Epoch, Monotonic

K = TypeVar("K")
MOST: Final = 10_000
"""Devices, and addresses, that are remembered; of more the oldest are forgotten."""
LATELY_S: Final = 300.0
"""A refusal explains a silence for this long; an agent reports more often."""
_WORDS: Final = {
    401: "its credential or token is unknown here; was api.agent_key_file or the token replaced?",
    403: "its credential or token is for something else",
    410: "it is not the accepted agent",
}


@dataclass(frozen=True, slots=True)
class RefusedReport:
    """One report that was refused."""

    status: int
    """401, 403 or 410."""
    epoch: Epoch | None
    """That the agent claims; None = it claims none."""
    peer: str
    """Its address; "" = unknown."""
    at: Monotonic
    why: str = ""
    """More than the status says."""

    def in_words(self) -> str:
        """For a reason."""
        where = f" from {self.peer}" if self.peer else ""
        return (
            f"HTTP {self.status}{where}: {self.why or _WORDS.get(self.status, 'no reason given')}"
        )


@dataclass(slots=True)
class RefusedReports:
    """The last refusal of each device, and of each address that named no device."""

    _by_slug: OrderedDict[Slug, RefusedReport] = field(default_factory=OrderedDict)
    _by_peer: OrderedDict[str, RefusedReport] = field(default_factory=OrderedDict)

    def note(self, slug: Slug | None, refusal: RefusedReport) -> None:
        """A report was refused. `slug`: the device that it claims to be of; None = it names none."""
        if slug is not None:
            _put(self._by_slug, slug, refusal)
        elif refusal.peer:
            _put(self._by_peer, refusal.peer, refusal)

    def accepted(self, slug: Slug) -> None:
        """A report of this device was accepted."""
        self._by_slug.pop(slug, None)

    def slugs(self) -> list[Slug]:
        """The devices of which a report was refused after the last one that was accepted."""
        return list(self._by_slug)

    def at(self, slug: Slug, epoch: Epoch, addresses: Iterable[str], now: Monotonic) -> str:
        """As `of`, for a report that names the device and epoch and came from one of these addresses."""
        found = self._by_slug.get(slug)
        if found is None or found.epoch != epoch or found.peer not in addresses:
            return ""
        return found.in_words() if now - found.at <= LATELY_S else ""

    def of(self, slug: Slug, epoch: Epoch, addresses: Iterable[str], now: Monotonic) -> str:
        """Why the agent of this device and epoch, at one of these addresses, was refused lately; "" = it was
        not, as far as is known."""
        found = self._by_slug.get(slug)
        if found is not None and found.epoch not in (None, epoch):
            found = None  # an older agent, which is to be refused
        if found is None:
            found = next((one for a in addresses if (one := self._by_peer.get(a))), None)
        return found.in_words() if found is not None and now - found.at <= LATELY_S else ""


def _put(memory: OrderedDict[K, RefusedReport], key: K, refusal: RefusedReport) -> None:
    memory[key] = refusal
    memory.move_to_end(key)
    if len(memory) > MOST:
        memory.popitem(last=False)

"""Places for connections: how many there may be, in total and per address, and which one makes room for a new one.

A connection is unauthenticated until a request on it was authenticated. Unauthenticated connections have a part of
the places and are paced per address; the rest is for callers that have shown a token, a credential or a signature.
Of the unauthenticated ones, the oldest idle one of the address with the most of them makes room; of the others the
oldest idle one, those of operators and replicas last. A connection is idle unless a request of it is being handled:
one that sends or reads slowly is idle too. Nothing here does I/O: whoever admits a connection says how it is closed.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from typing import Final

from nomad_watchdog.metrics import Closing

LEAST: Final = 16
"""Places that there always are."""

UNAUTHENTICATED_PART: Final = 8
"""One place in this many is for unauthenticated connections, and no others are."""
BURST_S: Final = 4.0
"""An address may send what it may send in this time at once."""
MAX_WAIT_S: Final = 1.0
"""A connection waits at most this long for its address's turn; one that would wait longer is closed."""
MAX_ADDRESSES: Final = 16_384


class Rank(IntEnum):
    """The most that a connection has shown. The lower ones make room first."""

    UNAUTHENTICATED = 0
    KNOWN = 1
    OPERATOR = 2
    """An operator or another replica."""


@dataclass(slots=True, eq=False)
class Place:
    """One connection's place."""

    places: ConnectionLimits | None
    address: str
    close: Callable[[], object] = lambda: None
    """Closes it at once. Set by whoever admits it."""
    unread: Callable[[], bool] = lambda: False
    """Whether it has sent something that was not read yet. Set by whoever admits it."""
    rank: Rank = Rank.UNAUTHENTICATED
    busy: bool = False
    """A request is being handled, and waits for nothing of the other side."""
    wait_s: float = 0.0
    """Before it may be served."""

    @property
    def idle(self) -> bool:
        """Whether it may be closed for another. One that has sent a request that we have not read yet may not: that
        it waits is our fault, unless it waits for its address's rate."""
        return not self.busy and (self.wait_s > 0.0 or not self.unread())

    def work(self) -> None:
        """A request is being handled."""
        self.busy = True

    def rest(self) -> None:
        """It waits for the other side."""
        self.busy = False
        if self.places is not None:
            self.places.used(self)

    def rise(self, rank: Rank) -> bool:
        """Its request was authenticated. False: there is no place for it beyond this request."""
        if self.places is None:
            self.rank = max(self.rank, rank)
            return True
        return self.places.rank(self, rank)

    def spend(self) -> bool:
        """One more unauthenticated request. False: its address must wait before it may send another."""
        return self.places is None or self.places.pace.spend(self.address, self.places.now()) == 0.0

    def give_up(self) -> None:
        """Close it: its other side takes nothing."""
        if self.places is not None:
            self.places.closed(Closing.SLOW)
        self.close()

    def leave(self) -> None:
        """The connection is gone."""
        if self.places is not None:
            self.places.left(self)


@dataclass(slots=True)
class AcceptRate:
    """Unauthenticated requests of each address: `rate` per second, with a burst. Bounded in memory."""

    rate: float
    _due: OrderedDict[str, float] = field(default_factory=OrderedDict)
    """Address → when it will have paid for all that it sent, monotonic seconds; the latest last."""

    def spend(self, address: str, now: float) -> float:
        """Seconds until the request may be handled; infinite, and nothing is spent, if that is too long."""
        due = max(self._due.pop(address, now), now)
        wait = max(0.0, due + 1.0 / self.rate - now - BURST_S)
        late = wait > MAX_WAIT_S
        self._due[address] = due if late else due + 1.0 / self.rate
        if len(self._due) > MAX_ADDRESSES:
            self._due.popitem(last=False)
        return float("inf") if late else wait

    def refund(self, address: str) -> None:
        """The request was authenticated after all."""
        if address in self._due:
            self._due[address] -= 1.0 / self.rate


@dataclass(slots=True)
class ConnectionLimits:
    """All places. `most` in total, `per_address` of one address, both at least LEAST."""

    most: int
    per_address: int
    pace: AcceptRate
    now: Callable[[], float]
    """Monotonic seconds."""
    closed: Callable[[Closing], None] = lambda _why: None
    """Called for each connection that is closed for want of a place."""
    _strangers: dict[str, OrderedDict[Place, None]] = field(default_factory=dict)
    """Address → its unauthenticated connections, the longest idle first."""
    _known: dict[Rank, OrderedDict[Place, None]] = field(
        default_factory=lambda: {Rank.KNOWN: OrderedDict(), Rank.OPERATOR: OrderedDict()}
    )
    _of: Counter[str] = field(default_factory=Counter)
    """Address → its connections."""
    _unauthenticated: int = 0

    @property
    def unauthenticated(self) -> int:
        return self._unauthenticated

    @property
    def authenticated(self) -> int:
        return sum(len(group) for group in self._known.values())

    @property
    def _most_unauthenticated(self) -> int:
        return max(1, self.most // UNAUTHENTICATED_PART)

    def admit(self, address: str) -> Place | None:
        """A place for a new connection; None if there is none, and it is to be closed."""
        wait_s = self.pace.spend(address, self.now())
        if wait_s > MAX_WAIT_S:
            self.closed(Closing.RATE)
            return None
        if not self._room_for(address):
            self.closed(Closing.FULL)
            return None
        place = Place(self, address, wait_s=wait_s)
        self._enter(place)
        return place

    def _room_for(self, address: str) -> bool:
        if self._of[address] >= self.per_address and not (
            self._evict(self._strangers.get(address)) or self._evict_known(address)
        ):
            return False
        if self._unauthenticated >= self._most_unauthenticated:
            return any(self._evict(group) for group in self._largest())
        return self._unauthenticated + self.authenticated < self.most or self._evict_known()

    def room(self) -> bool:
        """Whether there is a place for a new connection. If not, it is to wait unaccepted: those that have places will
        be served soon."""
        if self._unauthenticated < self._most_unauthenticated:
            return True
        return any(place.idle for group in self._largest() for place in group)

    def _largest(self) -> Iterable[OrderedDict[Place, None]]:
        """The unauthenticated connections of each address, the address with the most of them first. The others are
        sorted only if that one has none that may be closed."""
        most = max(self._strangers.values(), key=len)
        yield most
        yield from sorted(
            (group for group in self._strangers.values() if group is not most),
            key=len,
            reverse=True,
        )

    def _evict(self, group: OrderedDict[Place, None] | None, address: str | None = None) -> bool:
        for place in group or ():
            if address in (None, place.address) and place.idle:
                self._leave(place)
                self.closed(Closing.ROOM)
                place.close()
                return True
        return False

    def _evict_known(self, address: str | None = None) -> bool:
        return any(self._evict(group, address) for group in self._known.values())

    def rank(self, place: Place, rank: Rank) -> bool:
        """See `Place.rise`."""
        if place.rank >= rank or not self._has(place):
            return True
        self._leave(place)
        if place.rank is Rank.UNAUTHENTICATED:
            self.pace.refund(place.address)
        place.rank = rank
        full = self.authenticated >= self.most - self._most_unauthenticated
        room = not full or self._evict_known()
        self._enter(place)
        return room

    def used(self, place: Place) -> None:
        """Its request was handled: it is the one that was idle for the shortest time."""
        if self._has(place):
            self._group(place).move_to_end(place)

    def left(self, place: Place) -> None:
        if self._has(place):
            self._leave(place)

    def _group(self, place: Place) -> OrderedDict[Place, None]:
        if place.rank is Rank.UNAUTHENTICATED:
            return self._strangers.setdefault(place.address, OrderedDict())
        return self._known[place.rank]

    def _has(self, place: Place) -> bool:
        if place.rank is Rank.UNAUTHENTICATED:
            return place in self._strangers.get(place.address, ())
        return place in self._known[place.rank]

    def _enter(self, place: Place) -> None:
        self._group(place)[place] = None
        self._of[place.address] += 1
        self._unauthenticated += place.rank is Rank.UNAUTHENTICATED

    def _leave(self, place: Place) -> None:
        group = self._group(place)
        del group[place]
        self._of[place.address] -= 1
        if not self._of[place.address]:
            del self._of[place.address]
        if place.rank is Rank.UNAUTHENTICATED:
            self._unauthenticated -= 1
            if not group:
                del self._strangers[place.address]


@lru_cache(maxsize=4096)
def network_of(text: str) -> str:
    """The address as limits count it; of IPv6 the network, for one host has 2^64 addresses in it."""
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return text
    if isinstance(address, IPv6Address) and address.ipv4_mapped is None and not address.is_loopback:
        return f"{IPv6Address(int(address) >> 64 << 64)}/64"
    return str(address)

"""Places for connections: the maximum number in total and per address, and which one makes room for a new one.

A connection is unauthenticated until a request on it was authenticated. Unauthenticated connections have a part of
the places and a rate limit per address. The rest is for callers with a valid token, credential or signature.
Of the unauthenticated connections, the oldest idle one of the address with the most connections makes room. Of the
others, the oldest idle one does, those of operators and replicas last. A connection is idle unless a request of it
is being handled: one that sends or reads slowly is idle too. This module does no I/O: the caller of `admit` sets how
a connection is closed.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from typing import Final

from nomad_watchdog.metrics.labels import Closing

MIN_PLACES: Final = 16
"""Minimum number of places."""

UNAUTHENTICATED_PART: Final = 8
"""One in this many places is for unauthenticated connections."""
BURST_S: Final = 4.0
"""Burst of an address: the requests that its rate allows in this time."""
MAX_WAIT_S: Final = 1.0
"""Maximum wait of a connection for the rate of its address; one that would wait longer is closed."""
MAX_ADDRESSES: Final = 16_384


class Rank(IntEnum):
    """The authentication of a connection. Lower ranks make room first."""

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
    """Closes it at once. Set by the caller of `admit`."""
    unread: Callable[[], bool] = lambda: False
    """Whether it has sent bytes that were not read yet. Set by the caller of `admit`."""
    rank: Rank = Rank.UNAUTHENTICATED
    busy: bool = False
    """A request is being handled, and does not wait for the client."""
    wait_s: float = 0.0
    """Wait before it is served, seconds."""

    @property
    def idle(self) -> bool:
        """Whether it may be closed for another. A connection whose request was not read yet may not: the server is
        late, unless the connection waits for the rate of its address."""
        return not self.busy and (self.wait_s > 0.0 or not self.unread())

    def work(self) -> None:
        """A request is being handled."""
        self.busy = True

    def rest(self) -> None:
        """It waits for the client."""
        self.busy = False
        if self.places is not None:
            self.places.used(self)

    def promote(self, rank: Rank) -> bool:
        """Its request was authenticated. False: it has no place after this request."""
        if self.places is None:
            self.rank = max(self.rank, rank)
            return True
        return self.places.rank(self, rank)

    def spend(self) -> bool:
        """Count an unauthenticated request. False: its address must wait before the next one."""
        return self.places is None or self.places.pace.spend(self.address, self.places.now()) == 0.0

    def close_as_slow(self) -> None:
        """Close it: the client reads nothing."""
        if self.places is not None:
            self.places.closed(Closing.SLOW)
        self.close()

    def leave(self) -> None:
        """The connection was closed."""
        if self.places is not None:
            self.places.left(self)


@dataclass(slots=True)
class AcceptRate:
    """Rate limit of the unauthenticated requests of each address, per second, with a burst. Bounded in memory."""

    rate: float
    _due: OrderedDict[str, float] = field(default_factory=OrderedDict)
    """Address → when its budget is full again, monotonic seconds; the latest last."""

    def spend(self, address: str, now: float) -> float:
        """Seconds until the request may be handled; infinite if that is too long, and then nothing is counted."""
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
    """All places: at most `most` in total and `per_address` per address, both at least MIN_PLACES."""

    most: int
    per_address: int
    pace: AcceptRate
    now: Callable[[], float]
    """Monotonic seconds."""
    closed: Callable[[Closing], None] = lambda _why: None
    """Called for each connection that is closed for lack of a place."""
    _unknown: dict[str, OrderedDict[Place, None]] = field(default_factory=dict)
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
            self._evict(self._unknown.get(address)) or self._evict_known(address)
        ):
            return False
        if self._unauthenticated >= self._most_unauthenticated:
            return any(self._evict(group) for group in self._largest())
        return self._unauthenticated + self.authenticated < self.most or self._evict_known()

    def room(self) -> bool:
        """Whether a new connection can be accepted. If not, it waits: current connections are served soon."""
        if self._unauthenticated < self._most_unauthenticated:
            return True
        return any(place.idle for group in self._largest() for place in group)

    def _largest(self) -> Iterable[OrderedDict[Place, None]]:
        """The unauthenticated connections of each address, the address with the most first. The others are sorted
        only if that address has none that may be closed."""
        most = max(self._unknown.values(), key=len)
        yield most
        yield from sorted(
            (group for group in self._unknown.values() if group is not most),
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
        """See `Place.promote`."""
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
        """Its request was handled: it was idle for the shortest time now."""
        if self._has(place):
            self._group(place).move_to_end(place)

    def left(self, place: Place) -> None:
        if self._has(place):
            self._leave(place)

    def _group(self, place: Place) -> OrderedDict[Place, None]:
        if place.rank is Rank.UNAUTHENTICATED:
            return self._unknown.setdefault(place.address, OrderedDict())
        return self._known[place.rank]

    def _has(self, place: Place) -> bool:
        if place.rank is Rank.UNAUTHENTICATED:
            return place in self._unknown.get(place.address, ())
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
                del self._unknown[place.address]


@lru_cache(maxsize=4096)
def network_of(text: str) -> str:
    """The address for limits; for IPv6 its /64 network, because one host has 2^64 addresses in it."""
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return text
    if isinstance(address, IPv6Address) and address.ipv4_mapped is None and not address.is_loopback:
        return f"{IPv6Address(int(address) >> 64 << 64)}/64"
    return str(address)

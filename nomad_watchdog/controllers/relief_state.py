"""The state of relief as the registry stores it: one document."""

from __future__ import annotations

from dataclasses import asdict
from typing import Final

from pydantic import BaseModel

from nomad_watchdog.core.relief import ReliefMove, ReliefState, Rest
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import Epoch, WallTime
from nomad_watchdog.registry.document import DocumentFormat


class _MoveFields(BaseModel):
    slug: str
    epoch: int
    ref: str
    host: str
    reason: str
    since: float
    withdrawn: float

    def move(self) -> ReliefMove:
        return ReliefMove(
            Slug(self.slug),
            Epoch(self.epoch),
            self.ref,
            self.host,
            self.reason,
            WallTime(self.since),
            WallTime(self.withdrawn),
        )


class _RestFields(BaseModel):
    until: float
    doublings: int
    judged: bool
    host: str

    def rest(self) -> Rest:
        return Rest(WallTime(self.until), self.doublings, self.judged, self.host)


class _StateFields(BaseModel):
    moves: list[_MoveFields]
    hosts: dict[str, _RestFields]
    devices: dict[str, _RestFields]


def _parsed(fields: object) -> ReliefState:
    found = _StateFields.model_validate(fields)
    return ReliefState(
        tuple(one.move() for one in found.moves),
        {host: one.rest() for host, one in found.hosts.items()},
        {Slug(slug): one.rest() for slug, one in found.devices.items()},
    )


def _serialized(state: ReliefState) -> dict[str, object]:
    return {
        "moves": [asdict(move) for move in state.moves],
        "hosts": {host: asdict(rest) for host, rest in state.hosts.items()},
        "devices": {slug: asdict(rest) for slug, rest in state.devices.items()},
    }


FORMAT: Final[DocumentFormat[ReliefState]] = DocumentFormat(
    name="relief",
    empty=ReliefState(),
    parse=_parsed,
    serialize=_serialized,
    repair="delete it",
    replaceable=True,  # what it remembers is of use for minutes
)

"""The rebalance of a fleet as the registry stores it: one document with the last one."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Final

from pydantic import BaseModel, Field

from nomad_watchdog.core.pauses import Target
from nomad_watchdog.core.rebalance import MARK, Going, Rebalance, RebalanceState
from nomad_watchdog.fleet.pauses import TargetFields
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import Epoch, WallTime
from nomad_watchdog.registry.document import DocumentFormat


def rebalance_json(now: Rebalance) -> dict[str, object]:
    """A rebalance in the API."""
    return {
        "id": now.id,
        "state": now.state.value,
        "reason": now.reason,
        "target": (now.target or Target()).shown(),
        "all": now.target is None,
        "max": now.most,
        "began": now.began,
        "by": now.by,
        "moved": now.arrived,
        "on_way": len(now.going),
    }


def _packed(marks: Iterable[str]) -> str:
    """The marks in base64, about 7 characters each."""
    return base64.b64encode(bytes.fromhex("".join(sorted(marks)))).decode()


def _unpacked(text: str) -> frozenset[str]:
    """Raises ValueError for what `_packed` does not write."""
    digits = base64.b64decode(text, validate=True).hex()
    if len(digits) % MARK:
        raise ValueError("marks are cut off")
    return frozenset(digits[at : at + MARK] for at in range(0, len(digits), MARK))


class _GoingFields(BaseModel):
    ref: str
    epoch: Epoch
    host: str

    def going(self) -> Going:
        return Going(self.ref, self.epoch, self.host)


class _Fields(BaseModel):
    id: str
    began: WallTime
    by: str
    target: TargetFields
    most: int = Field(alias="max")
    state: RebalanceState
    reason: str
    moved: int
    going: dict[Slug, _GoingFields]
    marks: str
    avoid: tuple[str, ...]
    useful: int
    useless: int
    unusable: frozenset[str]

    def rebalance(self) -> Rebalance:
        target = self.target.target()
        return Rebalance(
            id=self.id,
            began=self.began,
            by=self.by,
            target=None if target == Target() else target,
            most=self.most,
            state=self.state,
            reason=self.reason,
            going={slug: one.going() for slug, one in self.going.items()},
            moved=_unpacked(self.marks),
            avoid=self.avoid,
            arrived=self.moved,
            useful=self.useful,
            useless=self.useless,
            unusable=self.unusable,
        )


class _DocumentFields(BaseModel):
    rebalance: _Fields | None


def _parsed(fields: object) -> Rebalance | None:
    found = _DocumentFields.model_validate(fields).rebalance
    return None if found is None else found.rebalance()


def _serialized(now: Rebalance | None) -> dict[str, object]:
    if now is None:
        return {"rebalance": None}
    return {
        "rebalance": rebalance_json(now)
        | {
            "going": {
                slug: {"ref": one.ref, "epoch": one.epoch, "host": one.host}
                for slug, one in now.going.items()
            },
            "marks": _packed(now.moved),
            "avoid": list(now.avoid),
            "useful": now.useful,
            "useless": now.useless,
            "unusable": sorted(now.unusable),
        }
    }


FORMAT: Final[DocumentFormat[Rebalance | None]] = DocumentFormat(
    name="rebalance",
    empty=None,
    parse=_parsed,
    serialize=_serialized,
    repair="put back what nomad-watchdog wrote",
)

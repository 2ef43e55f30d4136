"""Device records as JSON: in both stores, and in the files of export and import.

Reading is strict. Other programs can write to a store, so a record that this version would not have written itself is
rejected, with the reason, and left out (S9, S11).
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Final, TypeVar

import orjson

from nomad_watchdog.errors import UserError
from nomad_watchdog.fast_json import strict
from nomad_watchdog.ids import Slug, is_slug, parse_device_id, slug_of
from nomad_watchdog.model import (
    MAX_REASON,
    Condition,
    ConditionState,
    Departure,
    Device,
    DeviceRecord,
    Epoch,
    Presence,
    WallTime,
)

log = logging.getLogger(__name__)

VERSION: Final = 1
MAX_BYTES: Final = 16 * 1024
"""Of one record as JSON: 128 labels of 100 characters fit."""
_FIELDS: Final = frozenset(
    {"v", "slug", "id", "agent_class", "address", "labels", "presence", "generation", "epoch"}
    | {"instance", "changed_at"}
)
_OPTIONAL: Final = frozenset(
    {"event_at", "event_marks", "ttl_s", "source", "left", "home", "condition"}
)
"""Written only if they are set, so that records without them stay unchanged."""
_CONDITION: Final = frozenset({"state", "since", "reason", "misses"})
_MARK: Final = re.compile(r"[0-9a-f]{12}", re.ASCII)


_Choice = TypeVar("_Choice", bound=StrEnum)


class PoisonError(UserError):
    """A stored record that can't be decoded; the message says why."""


def encode(record: DeviceRecord) -> bytes:
    """The record without its index. Raises UserError when it is larger than 16 KiB or is no text."""
    device = record.device
    document = {
        "v": VERSION,
        "slug": record.slug,
        "id": device.id,
        "agent_class": device.agent_class,
        "address": device.address,
        "labels": dict(device.labels),
        "presence": record.presence.value,
        "generation": record.generation,
        "epoch": record.epoch,
        "instance": record.instance,
        "changed_at": record.changed_at,
    }
    if record.event_at:
        document |= {"event_at": record.event_at, "event_marks": list(record.event_marks)}
    if device.ttl_s is not None:
        document["ttl_s"] = device.ttl_s
    if record.source:
        document["source"] = record.source
    if record.left is not Departure.REMOVED:
        document["left"] = record.left.value
    if record.home:
        document["home"] = record.home
    condition = record.condition
    if condition is not None:
        document["condition"] = {
            "state": condition.state.value,
            "since": condition.since,
            "reason": condition.reason[:MAX_REASON],
            "misses": condition.misses,
        }
    since = condition.since if condition is not None else 0.0
    times = (record.changed_at, record.event_at, device.ttl_s or 0.0, since)
    if not all(map(math.isfinite, times)):
        raise UserError(f"record of device {device.id!a} can't be stored: a time is not finite")
    try:
        body = orjson.dumps(document, option=orjson.OPT_SORT_KEYS)
    except (TypeError, ValueError) as error:  # text that is no Unicode too
        raise UserError(f"record of device {device.id!a} can't be stored: {error}") from error
    if len(body) > MAX_BYTES:
        raise UserError(
            f"record of device {device.id!a} takes {len(body)} bytes; at most {MAX_BYTES} are "
            "allowed: give it fewer or shorter labels"
        )
    return body


def decode(body: bytes, *, slug: str | None = None, index: int = 0) -> DeviceRecord:
    """The record in body. slug: under which it was found, None = do not compare.

    Raises PoisonError for anything that `encode` would not have written.
    """
    if len(body) > MAX_BYTES:
        raise PoisonError(f"it takes {len(body)} bytes; at most {MAX_BYTES} are allowed")
    document = _parsed(body)
    if not isinstance(document, dict):
        raise PoisonError("it is not a JSON object")
    if document.get("v") != VERSION:
        raise PoisonError(
            f"its version is {str(document.get('v'))[:20]!r}; this program reads {VERSION}"
        )
    if document.keys() - _OPTIONAL != _FIELDS:
        odd = sorted(ascii(name)[:40] for name in (document.keys() - _OPTIONAL) ^ _FIELDS)
        raise PoisonError(f"fields are missing or unknown: {', '.join(odd[:5])}")
    return _record(document, slug, index)


def _parsed(body: bytes) -> object:
    try:
        document: object = orjson.loads(body)
        # A body that serializes to the same bytes is one that we write ourselves: no name occurs twice.
        if orjson.dumps(document, option=orjson.OPT_SORT_KEYS) == body:
            return document
    except (ValueError, TypeError):
        pass  # the other parser has the better message
    try:
        document = strict(body.decode())
    except ValueError as error:  # UnicodeDecodeError too
        raise PoisonError(f"it is not JSON: {str(error)[:100]}") from error
    return document


def _record(document: Mapping[str, object], slug: str | None, index: int) -> DeviceRecord:
    try:
        device_id = parse_device_id(document["id"])
    except UserError as error:
        raise PoisonError(str(error)) from error
    own = slug_of(device_id)
    if document["slug"] != own or (slug is not None and slug != own):
        raise PoisonError(f"its slug is not {own}, the one of its device id")
    labels = document["labels"]
    if not isinstance(labels, dict):
        raise PoisonError("labels is not an object")
    presence = _choice(document, "presence", Presence)
    left = _choice(document, "left", Departure) if "left" in document else Departure.REMOVED
    return DeviceRecord(
        slug=own,
        device=Device(
            id=device_id,
            agent_class=_text(document, "agent_class"),
            address=_text(document, "address"),
            labels={_encodable(key, "labels"): _text(labels, key) for key in labels},
            ttl_s=_ttl(document),
        ),
        presence=presence,
        generation=_whole(document, "generation"),
        epoch=Epoch(_whole(document, "epoch")),
        instance=_text(document, "instance"),
        changed_at=WallTime(_seconds(document, "changed_at")),
        index=index,
        event_at=_whole(document, "event_at") if "event_at" in document else 0,
        event_marks=_marks(document.get("event_marks", [])),
        source=_text(document, "source") if "source" in document else "",
        left=left,
        home=_text(document, "home") if "home" in document else "",
        condition=_condition(document["condition"]) if "condition" in document else None,
    )


def _ttl(document: Mapping[str, object]) -> float | None:
    if "ttl_s" not in document:
        return None
    ttl_s = _seconds(document, "ttl_s")
    if ttl_s < 0:
        raise PoisonError("ttl_s is less than 0")
    return ttl_s


def _condition(document: object) -> Condition:
    if not isinstance(document, dict) or document.keys() != _CONDITION:
        raise PoisonError(f"condition is not an object of {', '.join(sorted(_CONDITION))}")
    state = _choice(document, "state", ConditionState)
    reason = _text(document, "reason")
    if len(reason) > MAX_REASON:
        raise PoisonError(f"reason of the condition has more than {MAX_REASON} characters")
    return Condition(
        state, WallTime(_seconds(document, "since")), reason, _whole(document, "misses")
    )


def _choice(document: Mapping[str, object], name: str, kind: type[_Choice]) -> _Choice:
    try:
        return kind(_text(document, name))
    except ValueError as error:
        raise PoisonError(f"{name} is none of {', '.join(kind)}") from error


def _text(document: Mapping[str, object], name: str) -> str:
    value = document[name]
    if not isinstance(value, str):
        raise PoisonError(f"{ascii(name)[:40]} is not text")
    return _encodable(value, name)


def _encodable(value: str, name: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PoisonError(f"{ascii(name)[:40]} contains half a surrogate pair") from error
    return value


def _marks(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(
        isinstance(one, str) and _MARK.fullmatch(one) for one in value
    ):
        raise PoisonError("event_marks is not a list of 12 hexadecimal digits each")
    return tuple(value)


def _whole(document: Mapping[str, object], name: str) -> int:
    value = document[name]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise PoisonError(f"{name} is not a whole number from 0 to 2^63 - 1")
    return value


def _seconds(document: Mapping[str, object], name: str) -> float:
    value = document[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise PoisonError(f"{name} is not a number of seconds")
    return float(value)


class Decoder:
    """Decodes whole stores again and again, and only what changed: a record with an unchanged index
    stays the same object. Not thread-safe."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, DeviceRecord | str]] = {}
        self.poisoned: dict[str, str] = {}
        self.unreadable: frozenset[Slug] = frozenset()
        """Slugs whose own key holds poison."""

    def decode(self, rows: Iterable[tuple[str, str, int, bytes]]) -> dict[Slug, DeviceRecord]:
        """Records by slug from (store key, slug, index, body); fills `poisoned`, logging what is new."""
        known: dict[str, tuple[int, DeviceRecord | str]] = {}
        records: dict[Slug, DeviceRecord] = {}
        poisoned: dict[str, str] = {}
        unreadable: set[Slug] = set()
        for key, slug, index, body in rows:
            entry = self._known.get(key)
            if entry is None or entry[0] != index:
                entry = (index, self._decode_one(key, slug, index, body))
            known[key] = entry
            if isinstance(entry[1], str):
                poisoned[key] = entry[1]
                if is_slug(slug):
                    unreadable.add(Slug(slug))
            else:
                records[entry[1].slug] = entry[1]
        self._known, self.poisoned = known, poisoned
        self.unreadable = frozenset(unreadable)
        return records

    @staticmethod
    def _decode_one(key: str, slug: str, index: int, body: bytes) -> DeviceRecord | str:
        try:
            return decode(body, slug=slug, index=index)
        except PoisonError as error:
            reason = str(error)
            log.warning("record left out", extra={"key": ascii(key)[:200], "reason": reason})
            return reason

    def forget(self) -> None:
        """Start over: the store may be another one."""
        self._known = {}

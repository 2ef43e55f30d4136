"""Of what several replicas saw of one thing: which events are the same change, and which are still to be told.

Every replica judges every device for itself, so that each has its own events of the same changes; one of
them, the teller, tells them for all. What one replica alone knows (who changed what, what was refused, what
was held) is told whoever saw it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Protocol, TypeVar

from nomad_watchdog.ids import Slug

Subject = tuple[Slug, str]
"""A device and what about it, or no device and a group: what has one state at a time."""

_PLAIN: Final[Mapping[str, str]] = {
    "present": "presence",
    "absent": "presence",
    "expired": "presence",
    "flapping": "flap",
    "steady": "flap",
    "condition.changed": "condition",
    "agent.restarted": "restart",
}
_COUNTED: Final[Mapping[str, str]] = {
    "repair": "number",
    "incident.updated": "count",
    "registry.restored": "index",
    "present": "generation",
    "absent": "generation",
    "expired": "generation",
    "condition.changed": "reason",
    "agent.restarted": "restarts",
}
"""Kind, or its head → what in the data tells two events of that kind apart."""


_RESTORED: Final = "registry.restored"
_OTHERS: Final = ("node", "replica")
"""Heads of kinds that are about something other than a device: it is named in the data, under the same word."""


def about(kind: str) -> str | None:
    """What a kind of event gives the state of (verdict, presence, flap, agent); None = a kind that gives none,
    so that a later event does not make an earlier one superfluous."""
    head = kind.partition(".")[0]
    return _PLAIN.get(kind, head if head in ("verdict", "agent") else None)


class EventLike(Protocol):
    """What is asked of an event."""

    @property
    def kind(self) -> str: ...
    @property
    def slug(self) -> Slug: ...
    @property
    def at(self) -> float: ...
    @property
    def data(self) -> Mapping[str, object]: ...


E = TypeVar("E", bound=EventLike)


def is_shared(event: EventLike) -> bool:
    """Whether every replica sees for itself what this event tells."""
    head = event.kind.partition(".")[0]
    heads = ("verdict", "repair", "incident", "agent", *_OTHERS)
    return head in heads or event.kind in _PLAIN or event.kind == _RESTORED


def subject(event: EventLike) -> Subject | None:
    """What a shared event is about; None for one that only its own replica can make sense of."""
    head = event.kind.partition(".")[0]
    if head == "incident":
        kind, group = event.data.get("kind"), event.data.get("group")
        return (Slug(""), f"incident {kind} {group}") if kind else None
    if event.kind == _RESTORED:
        return Slug(""), event.kind
    if head in _OTHERS:
        return Slug(""), f"{head} {event.data.get(head)}"
    return event.slug, _PLAIN.get(event.kind, head)


def state(event: EventLike) -> str:
    """What a shared event says of its subject; the same twice in a row is one change."""
    head = event.kind.partition(".")[0]
    key = _COUNTED.get(event.kind) or _COUNTED.get(head)
    return f"{event.kind} {event.data.get(key)}" if key else event.kind


def untold(own: Sequence[E], told: Mapping[Subject, tuple[str, float]], horizon: float) -> list[E]:
    """Of our own shared events, oldest first: those that whoever told before us has not told.

    `told`: the last state that was told of each subject, and when (wall time of its event). Of a subject
    that is not there nothing is known, and only events after `horizon` are taken. Clocks of replicas
    differ and so do the moments of judging, so the event that was told is found among ours by its state,
    the nearest in time of several; what came after it is to be told."""
    by_subject: dict[Subject, list[E]] = {}
    for event in own:
        about = subject(event)
        if about is not None:
            by_subject.setdefault(about, []).append(event)
    wanted: set[int] = set()
    for about, events in by_subject.items():
        wanted.update(map(id, _after(events, told.get(about), horizon)))
    return [event for event in own if id(event) in wanted]


def _after(events: list[E], last: tuple[str, float] | None, horizon: float) -> Iterable[E]:
    if last is None:
        return [event for event in events if event.at > horizon]
    said, at = last
    same = [number for number, event in enumerate(events) if state(event) == said]
    if same:
        nearest = min(same, key=lambda number: (abs(events[number].at - at), -number))
        return events[nearest + 1 :]
    return [event for event in events if event.at > at]

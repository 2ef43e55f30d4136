"""Merges the events of several replicas: which ones are the same change, and which are not published yet.

Every replica judges every device, so each replica has its own events of the same changes. The leader publishes them
for all. Events that one replica alone knows (who changed what, what was refused or put on hold) are always published.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Protocol, TypeVar

from nomad_watchdog.ids import Slug

Subject = tuple[Slug, str]
"""A device and one of its aspects, or no device and a group; it has one state at a time."""

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
"""Kind, or its first part → the data field that distinguishes two events of that kind."""


_RESTORED: Final = "registry.restored"
_OTHERS: Final = ("node", "replica")
"""First parts of kinds that are not about a device. The data field of the same name identifies the subject."""


def about(kind: str) -> str | None:
    """The aspect whose state a kind of event reports (verdict, presence, flap, agent); None = no state, so that a
    later event does not make an earlier one obsolete."""
    head = kind.partition(".")[0]
    return _PLAIN.get(kind, head if head in ("verdict", "agent") else None)


class EventLike(Protocol):
    """Interface of an event."""

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
    """Whether every replica detects the change of this event itself."""
    head = event.kind.partition(".")[0]
    heads = ("verdict", "repair", "incident", "agent", *_OTHERS)
    return head in heads or event.kind in _PLAIN or event.kind == _RESTORED


def subject(event: EventLike) -> Subject | None:
    """The subject of a shared event; None if only its own replica can interpret it."""
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
    """The state that a shared event reports for its subject; the same state twice in a row is one change."""
    head = event.kind.partition(".")[0]
    key = _COUNTED.get(event.kind) or _COUNTED.get(head)
    return f"{event.kind} {event.data.get(key)}" if key else event.kind


def unpublished(
    own: Sequence[E], published: Mapping[Subject, tuple[str, float]], horizon: float
) -> list[E]:
    """Our own shared events, oldest first, that the previous publisher has not published.

    `published`: the last published state of each subject, and the wall time of its event. For a subject that is not in it,
    only events after `horizon` are returned. Replicas judge at different times and their clocks differ, so the
    published event is identified among our own by its state, and by the nearest time if there are several. The events
    after it are returned."""
    by_subject: dict[Subject, list[E]] = {}
    for event in own:
        about = subject(event)
        if about is not None:
            by_subject.setdefault(about, []).append(event)
    wanted: set[int] = set()
    for about, events in by_subject.items():
        wanted.update(map(id, _after(events, published.get(about), horizon)))
    return [event for event in own if id(event) in wanted]


def _after(events: list[E], last: tuple[str, float] | None, horizon: float) -> Iterable[E]:
    if last is None:
        return [event for event in events if event.at > horizon]
    last_state, at = last
    same = [number for number, event in enumerate(events) if state(event) == last_state]
    if same:
        nearest = min(same, key=lambda number: (abs(events[number].at - at), -number))
        return events[nearest + 1 :]
    return [event for event in events if event.at > at]

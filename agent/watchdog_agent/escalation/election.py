"""What a group of agents that see one anomaly does next. Pure: no clock, no I/O; takes `now`.

A group is what anomalies have in common (a gateway, a site, a class or a host) and the kind of anomaly.
Each of its agents keeps a note; one of them holds the group's lock, and it alone tells. What is told stands
in one document of the group, written by compare-and-set in two steps: ``telling`` before the first byte
leaves, ``told`` when a sink has taken it. An heir finds ``telling`` and says the same again under the same
key, or ``told`` and says nothing. So whatever crashes, somebody tells, and receivers see one key.

A note without a lock says «still away» until its `until` (wall seconds), and is written anew long before; an
older one is of an agent that is gone: it counts for nothing, and whoever finds it takes it away.

Document: ``{"episode": id, "rev": n, "state": "telling"|"told", "at": wall seconds, "ids": [note ids],
"members": [[device id, reason], …]}``. Its `at` is compared with other hosts' clocks: their differences
count against the window.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from watchdog_agent.runtime.types import Entry, KvEntry, Told

MAX_NAMED = 500
"""Devices that an escalation names; of more it says the number."""
OLD_S = 2700.0
"""What was told so long ago, and has no note left, is taken away."""
FAR_S = 30 * 86400.0
"""A note that says to be good for longer was written by a clock that is wrong."""
HEIR_S = 60.0
"""An unfinished document of others is taken over at least so long: Consul needs 2 x TTL to free a lock."""


def group_of(
    by: list[str], labels: Mapping[str, str], values: Mapping[str, str]
) -> tuple[str, str] | None:
    """(kind, value) of the one group of an anomaly: the first kind of `by` that has a value. `values`
    (what is known now) takes precedence over `labels` (what the device was registered with)."""
    for kind in by:
        value = values.get(kind) or labels.get(kind)
        if value:
            return kind, value
    return None


def still_to_gather(
    began: float, newest: float, now: float, gather_s: float, window_s: float
) -> float:
    """Seconds to wait for more members: until nobody new has come for gather_s, and at most window_s."""
    return max(0.0, min(newest + gather_s, began + window_s) - now)


def covers(told: Told | None, note_id: str) -> bool:
    """Whether this anomaly is part of what was told: then its agent has nothing to say."""
    return told is not None and told["state"] == "told" and note_id in told["ids"]


def next_document(
    told: Told | None, present: Mapping[str, list[str]], now: float, window_s: float
) -> tuple[Told | None, float]:
    """(what the lock's holder must tell now, 0), (None, seconds to wait) or (None, 0) = nothing is left.

    `present`: note id → [device id, reason] of the notes whose agents live. `now`: wall seconds."""
    if told is not None and told["state"] == "telling":
        mine = any(one in present for one in told["ids"])
        if mine or now < told["at"] + max(HEIR_S, 2 * window_s):
            return told, 0.0
        told = None
    fresh = {one: what for one, what in present.items() if told is None or one not in told["ids"]}
    if not fresh:
        return None, 0.0
    if told is not None and now < told["at"] + window_s:
        # An update at most once a window; a clock that jumped back makes nobody wait for longer.
        return None, min(told["at"] + window_s - now, window_s)
    if told is not None and now < told["at"] + 2 * window_s:
        return _document(told["episode"], told["rev"] + 1, now, told, fresh), 0.0
    return _document(min(fresh), 1, now, None, fresh), 0.0


def _document(
    episode: str, rev: int, now: float, before: Told | None, fresh: Mapping[str, list[str]]
) -> Told:
    ids = list(before["ids"]) if before else []
    named = list(before["members"]) if before else []
    room = max(0, MAX_NAMED - len(named))
    return {
        "episode": episode,
        "rev": rev,
        "state": "telling",
        "at": now,
        "ids": ids + sorted(fresh),
        "members": named + sorted(fresh.values())[:room],
    }


def finished(document: Told, now: float) -> Told:
    """The document after a sink has taken it."""
    return {**document, "state": "told", "at": now}


def checked(document: object) -> Told | None:
    """A document as found in Consul, or None: what somebody else has written there is no document."""
    if not isinstance(document, dict) or document.get("state") not in ("telling", "told"):
        return None
    texts = isinstance(document.get("episode"), str) and isinstance(document.get("ids"), list)
    numbers = type(document.get("rev")) is int and isinstance(document.get("at"), (int, float))
    members = document.get("members")
    pairs = isinstance(members, list) and all(
        isinstance(one, list) and len(one) == 2 and all(isinstance(part, str) for part in one)
        for one in members
    )
    found: Told = document  # type: ignore[assignment]  # as checked here
    return found if texts and numbers and pairs else None


def read_group(found: list[KvEntry]) -> tuple[dict[str, list[str]], Told | None, int]:
    """(note id → [device id, reason] of the notes whose agents live and wait, what was told, its index)."""
    present: dict[str, list[str]] = {}
    told, index = None, 0
    for one in found:
        name, value = one["name"].rpartition("/")[2], one["value"]
        if name == "_told":
            told, index = checked(value), one["index"]
        elif name[:1] != "_" and one["session"] and isinstance(value, dict):
            present[str(value.get("id"))] = [str(value.get("device_id")), str(value.get("reason"))]
    return present, told, index


def counts(one: KvEntry, now: float) -> bool:
    """Whether an entry of a listing is the note of an agent that lives: a lock of its session says so, and
    without one its age. `now`: wall seconds."""
    value = one["value"]
    if one["name"].rpartition("/")[2][:1] == "_" or not isinstance(value, dict):
        return False
    until = value.get("until")
    fresh = isinstance(until, (int, float)) and now <= until <= now + FAR_S
    return bool(one["session"]) or fresh


def ended(found: list[KvEntry], entry: Entry, now: float) -> str:
    """The episode that this anomaly was the last one of, or "". `found`: the group's keys without our note;
    `entry`: our anomaly, with the `episode` that we know of if it was `told`. `now`: wall seconds."""
    _, told, _ = read_group(found)
    episode: str = entry["episode"] if entry["told"] else ""
    if not episode and told is not None and entry["id"] in told["ids"]:
        # Somebody has told of us, or was about to and may have.
        episode = told["episode"]
    same = told["ids"] if told is not None and told["episode"] == episode else ()
    # Those who were told of, but have not seen it yet, count as well.
    notes = [one["value"] for one in found if counts(one, now)]
    left = any(
        isinstance(one, dict) and (one.get("told") == episode or one.get("id") in same)
        for one in notes
    )
    return "" if left else episode


def stale(found: list[KvEntry], now: float) -> list[KvEntry]:
    """Of a listing what agents that are gone have left: notes that count for nothing, and what was told and
    the lock of a group without any other."""
    lived_in = {one["name"].rpartition("/")[0] for one in found if counts(one, now)}
    out = []
    for one in found:
        folder, _, name = one["name"].rpartition("/")
        value = one["value"]
        if one["session"] or not folder:
            continue
        if name == "_told":
            at = value.get("at") if isinstance(value, dict) else None
            known = isinstance(at, (int, float)) and -FAR_S < now - at < OLD_S
            old = folder not in lived_in and not known
        elif name == "_leader":
            old = folder not in lived_in
        else:
            old = not counts(one, now)
        if old:
            out.append(one)
    return out


def member_of(device_id: str, entry: Entry) -> list[str]:
    """[device id, reason] of an anomaly."""
    return [device_id, entry["summary"][:120]]


def folder_of(entry: Entry) -> str:
    """The place of an anomaly's group: readable kind, and a hash of what came from outside (S11)."""
    import hashlib

    kind, value = entry["group"] or ("", "")
    digest = hashlib.blake2b(
        f"{entry['key']}\0{kind}\0{value}".encode(), digest_size=10
    ).hexdigest()
    return f"{kind}-{digest}"

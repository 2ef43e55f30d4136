"""Decides the next action of the agents of a group that detect the same anomaly. Pure: no clock, no I/O; takes `now`.

A group is what anomalies have in common (a gateway, a site, a class or a host), plus the kind of anomaly. Each of its
agents keeps a note in Consul. Only the elected agent, which holds the group's lock, sends the alert. The group's
document records the alert. It is written by compare-and-set in two steps: with the state ``telling`` before anything
is sent, and with ``told`` when a sink has accepted it. A successor that finds ``telling`` sends the same alert again
with the same key; one that finds ``told`` sends nothing. So an alert is sent despite crashes, and a receiver can
recognize a repeated one by its key.

A note without a lock means that the device is still unhealthy, until the note's `until` (seconds since 1970). Its
agent rewrites it long before then. An expired note belongs to an agent that is gone: it is ignored, and any agent
that finds it deletes it.

Document: ``{"episode": id, "rev": n, "state": "telling"|"told", "at": seconds since 1970, "ids": [note ids],
"members": [[device id, reason], ...]}``. `at` is compared with other hosts' clocks, so their differences count against
the window.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from watchdog_agent.runtime.types import EscalationEntry, GroupAlert, KvEntry

MAX_NAMED = 500
"""Maximum number of devices that an escalation names; its count includes all of them."""
OLD_S = 2700.0
"""Age at which a group's document without notes is deleted, seconds."""
FAR_S = 30 * 86400.0
"""Maximum lifetime of a note; a longer one was written by a wrong clock."""
TAKE_OVER_S = 60.0
"""Minimum time for which a successor finishes another agent's document: Consul needs 2 x TTL to free a lock."""


def group_of(
    by: list[str], labels: Mapping[str, str], values: Mapping[str, str]
) -> tuple[str, str] | None:
    """(kind, value) of the group of an anomaly: the first kind in `by` that has a value. `values` (current data)
    takes precedence over `labels` (from the device's registration)."""
    for kind in by:
        value = values.get(kind) or labels.get(kind)
        if value:
            return kind, value
    return None


def still_to_gather(
    began: float, newest: float, now: float, gather_s: float, window_s: float
) -> float:
    """Seconds to wait for more members: until none has joined for gather_s, at most window_s in total."""
    return max(0.0, min(newest + gather_s, began + window_s) - now)


def covers(alert: GroupAlert | None, note_id: str) -> bool:
    """Whether this alert includes the anomaly with this note, so that its agent need not send one."""
    return alert is not None and alert["state"] == "told" and note_id in alert["ids"]


def next_document(
    alert: GroupAlert | None, present: Mapping[str, list[str]], now: float, window_s: float
) -> tuple[GroupAlert | None, float]:
    """(the alert that the lock's holder must send now, 0), (None, seconds to wait), or (None, 0) = nothing left to do.

    `present`: note ID → [device ID, reason] of the notes of running agents. `now`: seconds since 1970."""
    if alert is not None and alert["state"] == "telling":
        mine = any(one in present for one in alert["ids"])
        if mine or now < alert["at"] + max(TAKE_OVER_S, 2 * window_s):
            return alert, 0.0
        alert = None
    fresh = {one: what for one, what in present.items() if alert is None or one not in alert["ids"]}
    if not fresh:
        return None, 0.0
    if alert is not None and now < alert["at"] + window_s:
        # At most one update per window, also if the clock was set back.
        return None, min(alert["at"] + window_s - now, window_s)
    if alert is not None and now < alert["at"] + 2 * window_s:
        return _document(alert["episode"], alert["rev"] + 1, now, alert, fresh), 0.0
    return _document(min(fresh), 1, now, None, fresh), 0.0


def _document(
    episode: str, rev: int, now: float, before: GroupAlert | None, fresh: Mapping[str, list[str]]
) -> GroupAlert:
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


def finished(document: GroupAlert, now: float) -> GroupAlert:
    """The document after a sink has accepted the alert."""
    return {**document, "state": "told", "at": now}


def checked(document: object) -> GroupAlert | None:
    """A group's document read from Consul, or None if it is not valid."""
    if not isinstance(document, dict) or document.get("state") not in ("telling", "told"):
        return None
    texts = isinstance(document.get("episode"), str) and isinstance(document.get("ids"), list)
    numbers = type(document.get("rev")) is int and isinstance(document.get("at"), (int, float))
    members = document.get("members")
    pairs = isinstance(members, list) and all(
        isinstance(one, list) and len(one) == 2 and all(isinstance(part, str) for part in one)
        for one in members
    )
    found: GroupAlert = document  # type: ignore[assignment]  # as checked here
    return found if texts and numbers and pairs else None


def read_group(found: list[KvEntry]) -> tuple[dict[str, list[str]], GroupAlert | None, int]:
    """(note ID → [device ID, reason] of the notes of running agents that wait, the alert, its index)."""
    present: dict[str, list[str]] = {}
    alert, index = None, 0
    for one in found:
        name, value = one["name"].rpartition("/")[2], one["value"]
        if name == "_told":
            alert, index = checked(value), one["index"]
        elif name[:1] != "_" and one["session"] and isinstance(value, dict):
            present[str(value.get("id"))] = [str(value.get("device_id")), str(value.get("reason"))]
    return present, alert, index


def counts(one: KvEntry, now: float) -> bool:
    """Whether an entry is the note of a running agent: locked by a session, or not expired. `now`: seconds since
    1970."""
    value = one["value"]
    if one["name"].rpartition("/")[2][:1] == "_" or not isinstance(value, dict):
        return False
    until = value.get("until")
    fresh = isinstance(until, (int, float)) and now <= until <= now + FAR_S
    return bool(one["session"]) or fresh


def ended(found: list[KvEntry], entry: EscalationEntry, now: float) -> str:
    """The episode whose last anomaly this one was, or "". `found`: the group's keys without this agent's note;
    `entry`: this agent's anomaly. `now`: seconds since 1970."""
    _, alert, _ = read_group(found)
    episode: str = entry["episode"] if entry["told"] else ""
    if not episode and alert is not None and entry["id"] in alert["ids"]:
        # Another agent has sent an alert that includes this device, or may have.
        episode = alert["episode"]
    same = alert["ids"] if alert is not None and alert["episode"] == episode else ()
    # Agents whose device is in the alert but that do not know it yet count too.
    notes = [one["value"] for one in found if counts(one, now)]
    left = any(
        isinstance(one, dict) and (one.get("told") == episode or one.get("id") in same)
        for one in notes
    )
    return "" if left else episode


def stale(found: list[KvEntry], now: float) -> list[KvEntry]:
    """Keys left behind by agents that are gone: expired notes, and the document and lock of a group without any
    other key."""
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


def member_of(device_id: str, entry: EscalationEntry) -> list[str]:
    """[device id, reason] of an anomaly."""
    return [device_id, entry["summary"][:120]]


def folder_of(entry: EscalationEntry) -> str:
    """The folder of an anomaly's group: its kind, and a hash of the values that are untrusted input (S11)."""
    import hashlib

    kind, value = entry["group"] or ("", "")
    digest = hashlib.blake2b(
        f"{entry['key']}\0{kind}\0{value}".encode(), digest_size=10
    ).hexdigest()
    return f"{kind}-{digest}"

"""The status on one screen, the sentences of `explain`, and the line of an event."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomad_watchdog.cli._event_line import event_line
from nomad_watchdog.cli._summary import (
    MAX_DEVICES,
    WORST_FIRST,
    counted,
    device_lines,
    explained,
    status_lines,
)

ROWS = 24
GOOD = {
    "ready": True,
    "reason": "",
    "devices": 20,
    "verdicts": {"watched": 19, "offline": 1, "suspect": 0, "departed": 3},
    "placements": 20,
    "backend": "local",
    "replica": "r1",
    "holds": "1 of 1 shards",
    "version": "0.1.0",
}
BAD = GOOD | {
    "ready": False,
    "reason": "the registry is gone",
    "breaker": {"held": 12, "reason": "too many at once", "id": "a1", "next": "nomad-watchdog stops confirm a1"},
    "departures": {"held": 3, "reason": "too many silent", "id": "b2"},
    "queue": 4,
    "in_work": 2,
    "waiting_rollout": 7,
    "incidents": {"open": 1},
    "rollouts": {
        "gate": {
            "class": "gate", "version": "2", "state": "in progress", "step": "step 1 of 3", "ok": 2, "failed": 0,
            "waiting": 8, "next": "soaks for 9m",
        }
    },
    "config": {"problem": "line 3: no such setting", "needs_restart": ["api.listen"]},
    "unprepared_classes": {f"class-{n}": "no template" for n in range(20)},
    "closed_nodes": [{"node": "n1", "state": "draining", "agents": 9, "waits": "no room elsewhere"}],
}  # fmt: skip
names = sorted(
    {*BAD, "held", "open", "waits", "problem", "verdicts", "file", "id", "since_s", "next"}
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(names), inner, max_size=4)
    ),
    max_leaves=8,
)
answers = st.dictionaries(st.sampled_from(names), values, max_size=12)


def test_a_quiet_fleet_takes_six_lines() -> None:
    """Each line is one fact, and nothing is said about what is well."""
    assert status_lines(GOOD) == [
        "ready:    yes",
        "devices:  20 (19 watched, 1 offline), 3 departed",
        "agents:   20 on local",
        "replica:  r1 holds 1 of 1 shards, version 0.1.0",
        "on hold:  nothing",
        "in work:  nothing",
    ]


def test_what_needs_an_operator_is_named_with_what_to_do() -> None:
    """Holds name the command that approves them; problems of the control plane are listed, as many as fit."""
    lines = status_lines(BAD)
    assert lines[0] == "ready:    no: the registry is gone"
    stops = "12 stops of agents: too many at once; nomad-watchdog stops confirm a1"
    departures = "3 departures: too many silent; nomad-watchdog departures confirm b2"
    assert f"on hold:  {stops}; {departures}" in lines
    work = "2 actions running, 4 actions queued, 7 agents waiting for a roll-out, 1 open incident"
    assert f"in work:  {work}" in lines
    progress = "2 ok, 0 bad, 8 waiting; next: soaks for 9m"
    assert f"roll-out: gate 2: in progress, step 1 of 3; {progress}" in lines
    assert "attention: configuration: line 3: no such setting" in lines
    assert "attention: restart the service to apply api.listen" in lines
    assert lines[-1] == "and 18 more lines, see `nomad-watchdog status -o wide`"


def test_the_worst_devices_are_listed_and_the_rest_is_counted() -> None:
    """Offline comes before unwatched; what isn't shown is counted, with the command that lists it."""
    counts = counted({"verdicts": {"watched": 5, "unwatched": 30, "offline": 1}})
    assert counts == [("offline", 1), ("unwatched", 30)]
    shown = [
        {"id": "cam-1", "verdict": "offline", "since_s": 25.0, "reason": "no route"},
        {"id": "cam-22", "verdict": "unwatched", "since_s": 7300.0, "reason": "no report"},
    ]
    assert device_lines(shown, counts) == [
        "problems:",
        "  offline    cam-1    25s  no route",
        "  unwatched  cam-22    2h  no report",
        "  and 29 more: `nomad-watchdog devices ls --verdict` offline or unwatched",
    ]
    assert device_lines([], []) == []


@given(answers, st.lists(answers, max_size=MAX_DEVICES))
def test_whatever_the_service_answers_fits_a_screen(
    answer: dict[str, object], shown: list[dict[str, object]]
) -> None:
    """At most 24 lines, each printable (S11)."""
    counts = [(name, 100) for name in WORST_FIRST]
    lines = [*status_lines(answer), *device_lines(shown, counts)]
    assert len(lines) < ROWS  # with a prompt
    assert all(line.isprintable() for line in [*lines, *explained(answer), event_line(answer)])


def test_a_device_is_explained_in_four_sentences() -> None:
    """Verdict, since, why, next; what is unknown is said, not left out."""
    answer = {
        "id": "cam",
        "verdict": "offline",
        "since_s": 25.2,
        "reason": "no route",
        "next": "held: x",
    }
    assert explained(answer | {"next_in_s": 130.0}) == [
        "verdict: cam is offline.",
        "since:   25s ago.",
        "why:     no route.",
        "next:    held: x. In 2m.",
    ]
    assert explained({"id": "cam", "verdict": "departed"}) == [
        "verdict: cam is departed.",
        "since:   not known.",
        "why:     no reason is known.",
        "next:    nothing.",
    ]


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("verdict.offline", "no route", "is offline: no route"),
        ("plan.start", "the device is new", "agent is started: the device is new"),
        ("repair.not_helped", "restart", "repair not helped: restart"),
        ("present", "device registered (127.0.0.1)", "device registered (127.0.0.1)"),
        ("some.kind", "", "some.kind"),
    ],
)
def test_an_event_is_said_in_words(kind: str, text: str, words: str) -> None:
    """When, device, what happened; the kind on request."""
    event: dict[str, object] = {"at": 1780000000.0, "kind": kind, "device": "cam", "text": text}
    assert event_line(event).endswith(f"  cam  {words}")
    assert f"  {kind}  cam  " in event_line(event, with_kind=True)
    event["data"] = {"was": "watched", "was_for_s": 7200.0}
    assert event_line(event).endswith(" (was watched for 2h)")


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process's time zone."""
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("at", "shown"),
    [
        (1780000000.0, "2026-05-28 22:26:40"),
        (1795000000, "2026-11-18 12:06:40"),
        (None, ""),
        (float("nan"), ""),
        (1e300, ""),
        ("1780000000", ""),
    ],
)
@pytest.mark.usefixtures("berlin")
def test_moments_are_shown_in_local_time(at: object, shown: str) -> None:
    """With daylight saving; what is no moment is left out."""
    assert event_line({"at": at, "text": "x"}) == "  ".join(filter(None, [shown, "x"]))

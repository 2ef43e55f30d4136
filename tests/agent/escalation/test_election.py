"""The election of the alerting agent, as a unit: a toy Consul, agents that die at any step."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from watchdog_agent.escalation import election

WINDOW_S = 30.0


class Group:
    """One group's keys as Consul keeps them, and agents that run one step at a time like
    `escalation.election_round`."""

    def __init__(self, size: int) -> None:
        self.now = 1000.0
        self.size = size
        self.alive = set(range(size))
        self.notes = {number: f"{number:016x}" for number in range(size)}
        self.leader: int | None = None
        self.told: dict[str, Any] | None = None
        self.index = 0
        self.hand: dict[int, tuple[str, Any, int]] = {}
        """agent → (its current step, document, index that it has read)."""
        self.said: list[tuple[str, tuple[str, ...]]] = []
        """(key, note IDs) of each delivery that a sink has accepted."""

    def kill(self, number: int) -> None:
        """kill -9: the agent's session ends, and with it its note and its lock."""
        if len(self.alive) > 1:
            self.alive.discard(number)
            self.notes.pop(number, None)
            self.hand.pop(number, None)
            if self.leader == number:
                self.leader = None

    def lose_session(self, number: int) -> None:
        """The agent is alive but cut off for longer than its TTL: it does not know that its lock is gone."""
        if self.leader == number:
            self.leader = None

    def step(self, number: int) -> None:
        """Make the next call of this agent."""
        if number not in self.alive or number not in self.notes:
            return
        at, document, index = self.hand.get(number, ("look", None, 0))
        if at == "look":
            if election.covers(self.told, self.notes[number]):
                del self.notes[number]
            elif self.leader is None:
                self.leader = number
                self.hand[number] = ("list", None, 0)
        elif at == "list":
            self._list(number)
        elif at == "write":
            if index == self.index:
                self.told, self.index = document, self.index + 1
                self.hand[number] = ("say", document, self.index)
            else:
                self.hand[number] = ("list", None, 0)
        elif at == "say":
            key = f"{document['episode']}.{document['rev']}"
            self.said.append((key, tuple(document["ids"])))
            self.hand[number] = ("mark", document, index)
        elif at == "mark":
            # read again and set if it is still held, until the compare-and-set succeeds
            found = self.told or {}
            if (found.get("episode"), found.get("rev")) == (document["episode"], document["rev"]):
                self.told, self.index = election.finished(document, self.now), self.index + 1
            self.hand[number] = ("list", None, 0)

    def _list(self, number: int) -> None:
        present = {note: [str(agent), "r"] for agent, note in self.notes.items()}
        document, wait = election.next_document(self.told, present, self.now, WINDOW_S)
        if document is not None:
            self.hand[number] = ("write", document, self.index)
        elif wait == 0:
            self.notes.pop(number, None)
            self.hand.pop(number, None)
            if self.leader == number:
                self.leader = None


steps = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.integers(0, 5)),
        st.tuples(st.just("kill"), st.integers(0, 5)),
        st.tuples(st.just("cut"), st.integers(0, 5)),
        st.tuples(st.just("time"), st.integers(0, 5)),
    ),
    max_size=80,
)


def settled(group: Group) -> None:
    """Run until nothing is left to do, and check the guarantees."""
    for _ in range(100):
        for number in range(group.size):
            group.step(number)
        group.now += 1.0
    told_of = {note for _, notes in group.said for note in notes}
    assert {f"{number:016x}" for number in group.alive} <= told_of
    assert group.notes == {}
    assert len({key for key, _ in group.said}) == 1, group.said
    assert len(set(group.said)) == 1, "one key, and two contents"


@pytest.mark.parametrize("first", range(12))
@pytest.mark.parametrize("second", range(12))
@pytest.mark.parametrize("how", ["kill", "lose_session"])
def test_two_elected_ones_fail_at_every_step(first: int, second: int, how: str) -> None:
    """Wherever the leader and its successor fail, the alert is sent by the third agent or was sent by them, under one
    key."""
    group = Group(3)
    for number, steps_done in ((0, first), (1, second)):
        for _ in range(steps_done):
            group.step(number)
        getattr(group, how)(number)
    settled(group)


@given(st.integers(1, 6), steps)
def test_whatever_crashes_somebody_tells_and_under_one_key(size: int, history: list) -> None:
    """However agents that saw one anomaly together die or lose their session, as long as one lives, every living one is
    in an alert, and no device is alerted under two keys."""
    group = Group(size)
    for what, number in history:
        if what == "step":
            group.step(number)
        elif what == "kill":
            group.kill(number)
        elif what == "cut":
            group.lose_session(number)
        else:
            group.now += number
    settled(group)


@given(st.sets(st.integers(0, 99), min_size=1), st.sets(st.integers(0, 99)), st.floats(0, 200))
def test_an_update_comes_once_a_window_and_names_all(
    first: set[int], later: set[int], passed: float
) -> None:
    """New members wait for the window, then are alerted with the earlier ones under the same episode and the next
    revision; much later they are an episode of their own."""
    notes = {str(one): [str(one), "r"] for one in first}
    document, _ = election.next_document(None, notes, 0.0, WINDOW_S)
    assert document is not None
    told = election.finished(document, 0.0)
    fresh = {str(one): [str(one), "r"] for one in later - first}
    update, wait = election.next_document(told, notes | fresh, passed, WINDOW_S)
    if not fresh:
        assert (update, wait) == (None, 0.0)
    elif passed < WINDOW_S:
        assert update is None
        assert 0 < wait <= WINDOW_S
    elif passed < 2 * WINDOW_S:
        assert update is not None
        assert (update["episode"], update["rev"]) == (told["episode"], 2)
        assert set(update["ids"]) == notes.keys() | fresh.keys()
    else:
        assert update is not None
        assert (set(update["ids"]), update["rev"]) == (fresh.keys(), 1)
        assert update["episode"] != told["episode"]


@given(st.floats(0, 100), st.floats(0, 100), st.floats(0, 200))
def test_gathering_ends(began: float, newest: float, now: float) -> None:
    """Gathering waits for quiet but never beyond the window, however many keep arriving."""
    wait = election.still_to_gather(began, newest, now, 2.0, WINDOW_S)
    assert now + wait <= max(now, began + WINDOW_S) + 1e-9
    assert wait == 0 or now + wait <= newest + 2.0 + 1e-9


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists))
def test_only_a_document_is_taken_for_one(value: Any) -> None:
    """Any other value at the key is not a document."""
    assert election.checked(value) is None
    assert election.checked({"state": "told", "members": value}) is None


def test_a_group_is_the_first_kind_that_has_a_value() -> None:
    """What is known at runtime overrides the labels, and a kind that is not configured makes no group."""
    labels = {"gateway": "g1", "site": "s1"}
    assert election.group_of(["gateway", "site"], labels, {}) == ("gateway", "g1")
    assert election.group_of(["gateway"], labels, {"gateway": "g2"}) == ("gateway", "g2")
    assert election.group_of(["site", "gateway"], labels, {"class": "c"}) == ("site", "s1")
    assert election.group_of(["host"], labels, {"class": "c"}) is None


def entry(name: str, value: Any, session: str = "") -> dict[str, Any]:
    return {"name": name, "value": value, "session": session, "index": 7}


@pytest.mark.parametrize(
    ("one", "alive"),
    [
        (entry("g/pump", {"until": 1001.0}), True),
        (entry("g/pump", {"until": 999.0}), False),
        (entry("g/pump", {"until": 1000.0 + 60 * 86400}), False),
        (entry("g/pump", {"until": 999.0}, "a session"), True),
        (entry("g/pump", {"id": "1"}), False),
        (entry("g/pump", {"until": "1001"}), False),
        (entry("g/pump", None, "a session"), False),
        (entry("g/_told", {"until": 1001.0}), False),
    ],
)
def test_a_note_counts_while_it_is_locked_or_young(one: dict[str, Any], alive: bool) -> None:
    """A note without a lock counts until it expires; one from a clock that is far ahead, or that is malformed, never
    counts; a locked note counts at any age."""
    assert election.counts(one, 1000.0) is alive


@pytest.mark.parametrize(
    "knows", [True, False], ids=["knows that it was told", "does not know yet"]
)
@pytest.mark.parametrize(
    ("others", "last"),
    [
        ([], True),
        ([entry("g/pump-2", {"id": "2", "told": "", "until": 1005.0})], False),
        ([entry("g/pump-2", {"id": "2", "told": "e", "until": 1005.0})], False),
        ([entry("g/pump-2", {"id": "2", "told": "e", "until": 995.0})], True),
        ([entry("g/pump-2", {"id": "3", "told": "", "until": 1005.0})], True),
        ([entry("g/pump-2", {"id": "3", "told": "f", "until": 1005.0})], True),
    ],
)
@pytest.mark.parametrize("state", ["telling", "told"])
def test_the_last_of_an_episode_ends_it(
    state: str, others: list[dict[str, Any]], last: bool, knows: bool
) -> None:
    """This holds whether or not it knows that others alerted; an expired agent, or one of another episode, does not
    delay the end."""
    told = {"episode": "e", "rev": 1, "state": state, "at": 990.0, "ids": ["1", "2"], "members": []}
    mine = {"id": "1", "told": knows, "episode": "e" if knows else ""}
    found = [entry("g/_told", told), *others]
    assert election.ended(found, mine, 1000.0) == ("e" if last else "")


def test_who_nobody_told_of_ends_nothing() -> None:
    """Its device recovered before any alert named it, whether or not others have an episode."""
    told = {"episode": "e", "rev": 1, "state": "told", "at": 990.0, "ids": ["2"], "members": []}
    mine = {"id": "1", "told": False, "episode": ""}
    assert election.ended([], mine, 1000.0) == ""
    assert election.ended([entry("g/_told", told)], mine, 1000.0) == ""


def test_only_what_the_gone_have_left_is_taken_away() -> None:
    """Old notes are deleted, and with the last note of a group its old document and its free lock; what is fresh,
    locked, or of a group with living agents stays."""
    now = 100_000.0
    told = {"state": "told", "at": now - election.OLD_S - 1}
    stays = [
        entry("lived-in/pump-1", {"until": now + 5}),
        entry("lived-in/_told", told),
        entry("lived-in/_leader", {}),
        entry("just-told/_told", {"state": "told", "at": now - 5}),
        entry("led/_leader", {}, "a session"),
        entry("at-the-top", {"until": 1.0}),
    ]
    goes = [
        entry("lived-in/pump-2", {"until": now - 5}),
        entry("gone/pump-3", {"until": now - 5}),
        entry("gone/_told", told),
        entry("gone/_leader", {}),
        entry("strange/_told", "no document"),
    ]
    assert election.stale(goes + stays, now) == goes


@given(st.text(), st.text())
def test_a_place_is_made_of_safe_characters(key: str, value: str) -> None:
    """No key and no value of a group reaches a path unescaped (S11)."""
    place = election.folder_of({"key": key, "group": ["site", value]})
    assert set(place) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert len(place) == 25

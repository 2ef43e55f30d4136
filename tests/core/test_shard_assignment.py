"""The distribution of shards over replicas: even, complete, stable, and hardly changed by joins and leaves."""

from __future__ import annotations

import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from nomad_watchdog.core.shard_assignment import NOBODY, Moves, fair_shares, moves
from nomad_watchdog.ids import Shard

Holders = dict[Shard, str]
REPLICAS = st.lists(st.sampled_from([f"r{n}" for n in range(6)]), min_size=1, unique=True)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Holders, list[str]]:
    """Any holders, some of whom have left, and the current replicas."""
    replicas = draw(REPLICAS)
    shards = draw(st.integers(1, 24))
    names = st.sampled_from([NOBODY, *replicas, "leaving"])
    return {Shard(n): draw(names) for n in range(shards)}, replicas


def settle(holders: Holders, replicas: list[str]) -> tuple[Holders, int]:
    """Let the replicas act in turns until no moves are left; return the number of moves."""
    now, moved = dict(holders), 0
    for _ in range(4 * len(now) + 4):
        still = True
        for me in replicas:
            wanted = moves(now, replicas, me)
            for shard in wanted.give:
                now[shard] = NOBODY
                still = False
            for shard in wanted.take:
                assert now[shard] == NOBODY
                now[shard] = me
                moved += 1
                still = False
        if still:
            return now, moved
    raise AssertionError(f"it never ends: {now}")


@given(worlds())
def test_taking_turns_ends_with_every_shard_held_evenly(world: tuple[Holders, list[str]]) -> None:
    """Once leaving replicas have released their shards, every shard has one holder and loads differ by at most one."""
    holders, replicas = world
    let_go = {s: NOBODY if holder == "leaving" else holder for s, holder in holders.items()}
    now, _ = settle(let_go, replicas)
    loads = Counter(now.values())
    counts = [loads[replica] for replica in replicas]
    assert loads[NOBODY] == 0
    assert max(counts) - min(counts) <= 1


@given(worlds(), st.sampled_from([f"r{n}" for n in range(6)]))
def test_nobody_takes_what_is_held_nor_gives_what_it_does_not_hold(
    world: tuple[Holders, list[str]], me: str
) -> None:
    """A replica takes only free shards and releases only its own; never both at once."""
    holders, replicas = world
    wanted = moves(holders, replicas, me)
    assert all(holders[shard] == NOBODY for shard in wanted.take)
    assert all(holders[shard] == me for shard in wanted.give)
    assert not (wanted.take and wanted.give)
    if me not in replicas:
        assert wanted == Moves()


@given(st.integers(1, 24), REPLICAS)
def test_one_that_joins_moves_no_more_than_its_share(shards: int, replicas: list[str]) -> None:
    """A new replica gets its share, and no other shard is moved."""
    before, _ = settle(dict.fromkeys(map(Shard, range(shards)), NOBODY), replicas)
    after, moved = settle(before, [*replicas, "new"])
    share = Counter(after.values())["new"]
    assert moved == share == sum(before[s] != after[s] for s in before)
    assert share <= math.ceil(shards / (len(replicas) + 1))


@given(REPLICAS)
def test_with_one_shard_a_holder_stays(replicas: list[str]) -> None:
    """As in plain leader election, the holder keeps the only shard, whichever replicas join."""
    holders = {Shard(0): replicas[0]}
    for me in [*replicas, "r9"]:
        assert moves(holders, [*replicas, "r9"], me).take == ()
        assert moves(holders, [*replicas, "r9"], me).give == ()


@given(st.integers(1, 24), REPLICAS)
def test_those_left_behind_take_only_what_was_let_go(shards: int, replicas: list[str]) -> None:
    """When one of two or more leaves, the shards of the others are not moved."""
    everyone = [*replicas, "leaver"]
    before, _ = settle(dict.fromkeys(map(Shard, range(shards)), NOBODY), everyone)
    let_go = {s: NOBODY if holder == "leaver" else holder for s, holder in before.items()}
    after, moved = settle(let_go, replicas)
    assert moved == Counter(before.values())["leaver"]
    assert all(after[s] == before[s] for s in before if before[s] != "leaver")


@given(st.dictionaries(st.text(min_size=1), st.integers(0, 50), min_size=1), st.integers(1, 256))
def test_fair_shares_are_all_of_it(loads: dict[str, int], shards: int) -> None:
    """Shares add up to all shards and differ by at most one."""
    shares = fair_shares(loads, shards)
    assert sum(shares.values()) == shards
    assert max(shares.values()) - min(shares.values()) <= 1

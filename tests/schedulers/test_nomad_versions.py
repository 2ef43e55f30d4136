"""Missing features of older servers are replaced, and those of newer ones are used (answers
recorded on both)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nomad_watchdog.clients import nomad_features
from nomad_watchdog.clients.nomad_features import MINIMUM, Feature, NomadFeatures
from nomad_watchdog.model import AgentSpec, Epoch, PlacementState
from nomad_watchdog.schedulers import job_templates
from nomad_watchdog.schedulers.nomad import NomadScheduler
from nomad_watchdog.schedulers.nomad._view import JobIdentity, placement
from nomad_watchdog.testing.conformance import record_of
from tests.schedulers.recorded_nomad import RecordedNomad

MOCK = str(Path(__file__).with_name("mock.nomad.hcl"))
SPEC = AgentSpec("default", "1", "h", template=MOCK)
RECORD = record_of("recorded")
HOUR_NS = 3600 * 10**9


@pytest.mark.parametrize(
    ("builds", "expected"),
    [
        (["1.6.3"], (1, 6, 3)),
        (["1.11.3+ent"], (1, 11, 3)),
        (["1.11.3", "1.6.3", "1.10.5"], (1, 6, 3)),
        (["v1.8.0-beta.1"], (1, 8, 0)),
    ],
)
def test_the_oldest_server_counts(builds: list[str], expected: tuple[int, ...]) -> None:
    """During an upgrade any server may become leader, so the oldest version decides."""
    members = {"Members": [{"Tags": {"build": build}} for build in builds]}
    found = nomad_features.of_members(members)
    assert found == NomadFeatures(expected, exact=True)


@pytest.mark.parametrize(
    "answer",
    [
        {},
        [],
        None,
        "1.6.3",
        {"Members": None},
        {"Members": [{"Tags": None}, {}, 7, {"Tags": {"build": None}}]},
    ],
)
def test_members_without_a_version_are_no_answer(answer: object) -> None:
    """An answer without a version yields no version."""
    assert nomad_features.of_members(answer) is None


def test_each_feature_begins_at_its_version() -> None:
    """A feature is available from its first version on, and in none before."""
    for feature in Feature:
        *head, last = feature.since
        before = (*head, last - 1) if last else (head[0], head[1] - 1, 99)
        assert NomadFeatures(feature.since).has(feature)
        assert not NomadFeatures(before).has(feature)
    assert NomadFeatures((1, 11, 3)).missing() == []
    assert NomadFeatures(MINIMUM).missing() == list(Feature)


@pytest.mark.parametrize(
    ("version", "at_least"),
    [("1.6.3", (1, 6, 0)), ("1.8.4", (1, 8, 0)), ("1.11.3", (1, 11, 0))],
)
async def test_without_the_right_a_lower_bound_is_used(
    version: str, at_least: tuple[int, ...]
) -> None:
    """If the token may not read the members, only the features that the parser reveals are used."""
    nomad = RecordedNomad(version)
    nomad.members_denied = True
    async with nomad.client() as client:
        features = await client.features()
    assert (features.version, features.exact) == (at_least, False)
    assert str(features).endswith("or later")


async def test_features_are_read_once() -> None:
    """Not every call reads the version; `prepare` does, since the servers may have been
    upgraded."""
    nomad = RecordedNomad("1.6.3")
    async with nomad.client() as client:
        for _ in range(3):
            await client.features()
        assert [path for _, path, _ in nomad.requests] == ["/v1/agent/members"]


async def test_an_upgrade_of_the_servers_is_noticed() -> None:
    """The parent job describes the handling of a lost node in the syntax of the current servers."""
    nomad = RecordedNomad("1.6.3")
    async with nomad.client() as client:
        scheduler = NomadScheduler(client=client)
        await scheduler.prepare([SPEC])
        (group,) = nomad.jobs["device-watchdog"]["TaskGroups"]
        assert group["MaxClientDisconnect"] == HOUR_NS
        assert group["ReschedulePolicy"] == {"Attempts": 0, "Unlimited": False}
        assert "Disconnect" not in group
        nomad.versions = ["1.11.3"]
        await scheduler.prepare([SPEC])
        (group,) = nomad.jobs["device-watchdog"]["TaskGroups"]
        assert group["MaxClientDisconnect"] is None
        assert group["ReschedulePolicy"]["Unlimited"] is True
        expected = {"LostAfter": HOUR_NS, "Replace": False, "Reconcile": "keep_original"}
        assert group["Disconnect"] == expected


@pytest.mark.parametrize("disconnect", [True, False])
@pytest.mark.parametrize("meta", [{"replace_lost": "true"}, {"replace_lost": "false"}, {}, None])
def test_replace_lost_means_the_same_on_both(
    meta: dict[str, str] | None, *, disconnect: bool
) -> None:
    """`replace_lost` becomes the block's `replace`, or rescheduling; without it no second agent
    starts."""
    group = {
        "MaxClientDisconnect": HOUR_NS,
        "Meta": meta,
        "ReschedulePolicy": {"Unlimited": True},
    }
    job_templates.adapt({"TaskGroups": [group]}, disconnect=disconnect)
    replaces = meta == {"replace_lost": "true"}
    block, policy = group.get("Disconnect"), group["ReschedulePolicy"]
    assert isinstance(policy, dict)
    if disconnect:
        assert isinstance(block, dict)
        assert (block["Replace"], policy["Unlimited"]) == (replaces, True)
    else:
        assert (block, policy["Unlimited"]) == (None, replaces)


async def test_a_template_with_the_block_gets_a_hint_on_an_old_server(tmp_path: Path) -> None:
    """A template that only newer servers can parse causes an error that says what to write instead,
    and works on newer ones."""
    path = tmp_path / "own.nomad.hcl"
    path.write_text('group "agent" { disconnect { lost_after = "1h" } }')
    spec = AgentSpec("default", "1", "h", template=str(path))
    nomad = RecordedNomad("1.6.3")
    async with nomad.client() as client:
        refused = await NomadScheduler(client=client).prepare([spec])
        assert re.search(
            r"1\.6\.3 has no block `disconnect`.*max_client_disc", refused[spec.agent_class]
        )
        nomad.versions = ["1.11.3"]
        assert await NomadScheduler(client=client).prepare([spec]) == {}


def test_an_old_server_must_not_stop_agents_itself() -> None:
    """`stop_after_client_disconnect` ends a job of Nomad 1.6 while its process may still run, so it
    is an error there."""
    group = {"Name": "g", "StopAfterClientDisconnect": HOUR_NS}
    job = {"Type": "batch", "TaskGroups": [group]}
    levels = {
        disconnect: {
            one.level
            for one in job_templates.lint(job, disconnect=disconnect)
            if "stop_on_client_after" in one.where
        }
        for disconnect in (True, False)
    }
    assert levels == {True: {"warning"}, False: {"error"}}


async def test_a_protected_token_costs_one_request_per_start() -> None:
    """On 1.11.3 the answer may name a job that does not exist. Its index is valid; no job is
    listed, evaluated or stopped for it."""
    nomad = RecordedNomad("1.11.3")
    async with nomad.client() as client:
        scheduler = NomadScheduler(client=client)
        assert await scheduler.ensure(RECORD, Epoch(1), SPEC) == 13
        asked = [(method, path.rpartition("/")[2]) for method, path, _ in nomad.requests]
        assert asked == [("POST", "dispatch"), ("GET", "members")]
        (found,) = (await scheduler.snapshot()).placements[RECORD.slug]
        assert found.ref.endswith("aaaaaaaa")


async def test_an_unprotected_token_leaves_the_oldest_job() -> None:
    """On 1.6.3 the loser of a race has started a second job, which is stopped."""
    nomad = RecordedNomad("1.6.3")
    async with nomad.client() as client:
        assert await NomadScheduler(client=client).ensure(RECORD, Epoch(1), SPEC) == 13
    assert [one["ID"][-8:] for one in nomad.children if not one["Stop"]] == ["aaaaaaaa"]


@pytest.mark.parametrize("version", ["1.6.3", "1.11.3"])
async def test_long_lists_are_read_to_their_end(version: str) -> None:
    """Pages past a power of ten never end on 1.6.3, where the list is read in one response
    instead."""
    nomad = RecordedNomad(version)
    nomad.allocations = [
        {"ID": f"{n:04x}", "CreateIndex": n, "JobID": "other", "ClientStatus": "complete"}
        for n in range(95, 106)
    ]
    async with nomad.client() as client:
        answer = await client.pages("/v1/allocations", "read-job", {})
    assert [one["CreateIndex"] for one in answer.body] == list(range(95, 106))
    paged = [query for _, path, query in nomad.requests if "next_token" in query]
    assert len(paged) == (5 if version == "1.11.3" else 0)


DRAINED = {
    "1.11.3": {"Migrate": True, "MigrateDisablePlacement": True},
    "1.6.3": {"Migrate": True},
}


@pytest.mark.parametrize("version", list(DRAINED))
def test_a_drained_child_ends_or_moves(version: str) -> None:
    """1.11.3 lets the job of a drained agent die, and the next epoch replaces it. 1.6.3 waits for a
    node and moves the agent at the same epoch, which does not count as a restart."""
    moves = version == "1.6.3"
    meta = {"device_id": RECORD.device.id, "slug": RECORD.slug, "epoch": "1"}
    job = {"ID": "j", "Meta": meta, "Status": "pending" if moves else "dead", "SubmitTime": 1}
    first = {
        "ID": "a1", "CreateIndex": 1, "ClientStatus": "complete", "DesiredStatus": "stop",
        "DesiredTransition": DRAINED[version], "TaskStates": {"agent": {"Restarts": 2}},
    }  # fmt: skip
    blocked = [{"Status": "blocked", "JobID": "j"}] if moves else []
    who = JobIdentity(RECORD.slug, RECORD.device.id, Epoch(1))
    drained = placement(job, who, [first], blocked, settled=False)
    assert drained.state is (PlacementState.RESTARTING if moves else PlacementState.DEAD)
    assert drained.queued is moves
    if moves:
        second = {
            "ID": "a2", "CreateIndex": 2, "ClientStatus": "running", "DesiredStatus": "run",
            "TaskStates": {"agent": {"Restarts": 0}},
        }  # fmt: skip
        moved = placement({**job, "Status": "running"}, who, [first, second], [], settled=False)
        assert (moved.state, moved.restarts) == (PlacementState.RUNNING, 0)
        assert moved.instances == ("a2",)


def test_a_placement_says_since_when_it_waits_and_whether_a_node_has_it() -> None:
    """It waits since the later of the job's submission and its newest allocation. Without an
    allocation it is in Nomad's queue while an evaluation is pending or blocked."""
    meta = {"device_id": RECORD.device.id, "slug": RECORD.slug, "epoch": "1"}
    job = {"ID": "j", "Meta": meta, "Status": "pending", "SubmitTime": 5_000_000_000}
    who = JobIdentity(RECORD.slug, RECORD.device.id, Epoch(1))
    lost = {
        "ID": "a1", "CreateIndex": 1, "ClientStatus": "lost", "DesiredStatus": "stop",
        "CreateTime": 6_000_000_000,
    }  # fmt: skip
    second = {
        "ID": "a2", "CreateIndex": 2, "ClientStatus": "pending", "DesiredStatus": "run",
        "CreateTime": 9_000_000_000,
    }  # fmt: skip
    waiting = [{"Status": "pending", "JobID": "j"}]
    forgotten = placement(job, who, [], [], settled=False)
    assert (forgotten.waits_since, forgotten.queued) == (5.0, False)
    assert placement(job, who, [], waiting, settled=False).queued
    moved = placement(job, who, [lost, second], waiting, settled=False)
    assert (moved.state, moved.waits_since, moved.queued) == (PlacementState.STARTING, 9.0, False)
    assert moved.instances == ("a2",)

"""Reports about Nomad's nodes: drains, and two nodes with the same name."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest

from nomad_watchdog.clients.nomad import NomadAccess, NomadClient
from nomad_watchdog.clients.nomad_rows import Allocation, Job
from nomad_watchdog.daemon.doctor import nodes as doctor_nodes
from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.model import AgentSpec, Epoch, Placement, PlacementState
from nomad_watchdog.schedulers import ClosedHost
from nomad_watchdog.schedulers.nomad import NomadScheduler
from nomad_watchdog.schedulers.nomad._view import JobIdentity, placement
from nomad_watchdog.schedulers.nomad.nodes import Node, NodeList, Nodes, deadline_of, node_of
from nomad_watchdog.testing.conformance import record_of
from servers.nomad import NomadServer
from tests.schedulers.conftest import eventually

MOCK = str(Path(__file__).with_name("mock.nomad.hcl"))
OLD, NEW = "3f2a1b7c-0000-0000-0000-000000000000", "8bc19d00-0000-0000-0000-000000000000"
DRIVERS = {"raw_exec": {"Healthy": True}}


def row(node: str, name: str, **more: Any) -> dict[str, Any]:
    """A row of /v1/nodes."""
    return {
        "ID": node,
        "Name": name,
        "Status": "ready",
        "Drain": False,
        "SchedulingEligibility": "eligible",
        "Drivers": DRIVERS,
        **more,
    }


DRAINED = row("d" * 36, "n2", Drain=True, SchedulingEligibility="ineligible")
STRATEGY = {"DrainStrategy": {"ForceDeadline": "2026-11-30T05:00:00.123456789Z"}}


async def doctor(*rows: dict[str, Any]) -> dict[str, tuple[str, str, str]]:
    """What doctor reports for these nodes: status, finding and fix by name of the check."""

    async def ask(_method: str, path: str) -> tuple[int, Any]:
        return (200, list(rows)) if path == "/v1/nodes" else (200, STRATEGY)

    return {
        name: (status, text, mend) for name, status, text, mend in await doctor_nodes.checks(ask)
    }


async def test_doctor_counts_no_node_that_takes_no_agents() -> None:
    """Draining, ineligible and down nodes are named with their state, and their drivers do not
    count."""
    found = await doctor(
        row("a" * 36, "n1"),
        DRAINED,
        row("b" * 36, "n3", SchedulingEligibility="ineligible"),
        row("c" * 36, "n4", Status="down"),
    )
    others = "n2 (draining until 2026-11-30T05:00:00Z), n3 (ineligible), n4 (down)"
    assert found["nomad nodes"][:2] == ("ok", f"1 of 4 take agents; the others: {others}")
    assert found["nomad drivers"][:2] == ("ok", "raw_exec on 1")
    assert "nomad node names" not in found
    found = await doctor(DRAINED)
    assert found["nomad nodes"][0] == found["nomad drivers"][0] == "fail"
    assert "node drain -disable" in found["nomad nodes"][2]


async def test_doctor_says_what_a_token_without_sight_of_nodes_costs() -> None:
    """Without `node:read` drains are not seen, so no agent leaves a draining node."""

    async def ask(_method: str, _path: str) -> tuple[int, Any]:
        return 403, "Permission denied"

    ((name, status, text, fix),) = await doctor_nodes.checks(ask)
    assert (name, status, text) == ("nomad nodes", "warn", "HTTP 403")
    assert 'node { policy = "read" }' in fix
    assert "no agent leaves a draining node" in fix


async def test_doctor_names_both_ids_of_a_name() -> None:
    """A client that has lost its data directory appears next to its old node."""
    found = await doctor(row(NEW, "n1"), row(OLD, "n1", Status="down"), row("a" * 36, "n2"))
    status, text, mend = found["nomad node names"]
    assert (status, text) == ("warn", "2 nodes are named n1: 3f2a1b7c (down), 8bc19d00 (ready)")
    assert "purge" in mend


def test_the_reason_of_an_agent_tells_of_its_node() -> None:
    """For a running agent only a drain is reported, for a lost one only another node of the same
    name; an unknown node changes nothing."""
    nodes = Nodes.of(
        [node_of(DRAINED, deadline_of(STRATEGY)), Node(OLD, "n1", "down"), Node(NEW, "n1", "ready")]
    )
    running, lost = PlacementState.RUNNING, PlacementState.LOST
    said = nodes.reason({"NodeID": "d" * 36}, running, "")
    assert said.startswith("node n2 is being drained: at 2026-11-30T05:00:00Z at the latest")
    said = nodes.reason({"NodeID": OLD}, lost, "node n1 does not answer")
    assert said.startswith("node n1 does not answer; it is the node with id 3f2a1b7c.")
    assert "(8bc19d00, ready) has registered" in said
    for alloc, state in (({"NodeID": "d" * 36}, lost), ({"NodeID": NEW}, running), (None, running)):
        assert nodes.reason(alloc, state, "as it was") == "as it was"
    assert deadline_of({"DrainStrategy": {"ForceDeadline": "0001-01-01T00:00:00Z"}}) == ""
    assert "without a deadline" in Nodes.of([node_of(DRAINED)]).reason(
        {"NodeID": "d" * 36}, running, ""
    )


def test_closed_nodes_are_those_that_an_operator_has_closed() -> None:
    """Drained and ineligible nodes, including one that is down; of two nodes with one name, the
    draining one. Without any node that takes agents, each is marked as such."""
    down = row(OLD, "n1", Status="down", SchedulingEligibility="ineligible")
    nodes = [node_of(DRAINED, deadline_of(STRATEGY)), node_of(down), node_of(row("a" * 36, "n3"))]
    assert Nodes.of(nodes).closed() == {
        "n1": ClosedHost(False, "ineligible and down", {OLD: False}),
        "n2": ClosedHost(True, "draining until 2026-11-30T05:00:00Z", {"d" * 36: True}),
    }
    twin = node_of(row(NEW, "n1", Drain=True, SchedulingEligibility="ineligible"))
    closed = Nodes.of([node_of(down), twin]).closed()
    said = "draining (id 8bc19d00, one of 2 nodes of this name)"
    both = {OLD: False, NEW: True}
    assert closed == {"n1": ClosedHost(True, said, both, is_last=True)}


@pytest.mark.parametrize(("created", "node"), [(9, ""), (11, "n" * 36)])
def test_a_job_that_is_updated_in_place_has_no_node_before_its_new_allocation(
    created: int, node: str
) -> None:
    """Until then its newest allocation is that of the epoch before, and must not be moved again."""
    who = JobIdentity(slug_of(DeviceId("d")), DeviceId("d"), Epoch(2))
    job: Job = {"ID": "j", "Status": "running", "JobModifyIndex": 10}
    alloc: Allocation = {
        "ID": "a",
        "JobID": "j",
        "ClientStatus": "running",
        "DesiredStatus": "run",
        "CreateIndex": created,
        "NodeID": "n" * 36,
        "NodeName": "n1",
    }
    found = placement(job, who, [alloc], [], settled=False)
    assert (found.node, found.node_id) == ("n1", node)


@pytest.mark.parametrize(
    ("modified", "state"), [(9, PlacementState.STOPPING), (11, PlacementState.RUNNING)]
)
def test_the_run_before_a_change_of_its_job_is_not_the_agent_of_the_next_epoch(
    modified: int, state: PlacementState
) -> None:
    """Until Nomad has looked at it, an allocation that is older than the change of its job counts as being stopped: as
    running it would make room for the next replacement. One that Nomad has updated in place runs."""
    who = JobIdentity(slug_of(DeviceId("d")), DeviceId("d"), Epoch(2))
    job: Job = {"ID": "j", "Status": "running", "JobModifyIndex": 10}
    alloc: Allocation = {
        "ID": "a",
        "JobID": "j",
        "ClientStatus": "running",
        "DesiredStatus": "run",
        "CreateIndex": 5,
        "ModifyIndex": modified,
    }
    assert placement(job, who, [alloc], [], settled=False).state is state


def test_an_event_of_a_node_is_news_only_if_it_shows_another_state() -> None:
    """A drain, an eligibility change, a new or a removed node is a change; a node that registers
    again unchanged is not."""
    seen = NodeList(NomadClient(NomadAccess(address="http://127.0.0.1:1")))
    seen.now = Nodes.of([node_of(row("a" * 36, "n1")), node_of(DRAINED)])

    def is_news(node: dict[str, Any], kind: str = "NodeEvent", topic: str = "Node") -> bool:
        return seen.is_news({"Topic": topic, "Type": kind, "Payload": {"Node": node}})

    same = row("a" * 36, "n1")
    assert not is_news(same)
    assert not is_news(same | {"DrainStrategy": None, "Drivers": {}})
    assert not is_news(DRAINED | {"Drain": None} | STRATEGY)
    assert is_news(same | {"SchedulingEligibility": "ineligible"})
    assert is_news(same | STRATEGY)
    assert is_news(same | {"Status": "down"})
    assert is_news(row("b" * 36, "n3"))
    assert is_news(same, "NodeDeregistration")
    assert not is_news(row("b" * 36, "n3"), "NodeDeregistration")
    assert not is_news(same | STRATEGY, topic="Allocation")
    assert not seen.is_news({"Topic": "Node", "Payload": None})


@pytest.mark.servers
@pytest.mark.asyncio(loop_scope="session")
async def test_a_drain_is_seen_by_the_next_look_and_ends(nomad: NomadServer) -> None:
    """A drained node counts as a change when checking whether a snapshot still holds, before the
    agent is affected; its reason has Nomad's deadline. After the drain the reason is gone."""
    scheduler = NomadScheduler(
        settings=NomadAccess(address=nomad.http_addr), prefix=f"t-{uuid.uuid4().hex[:8]}"
    )
    record, spec = record_of("drained"), AgentSpec("default", "1", "h", template=MOCK)

    async def agent() -> Placement:
        ((one,),) = (await scheduler.snapshot()).placements.values()
        return one

    async def runs() -> bool:
        return (await agent()).state is PlacementState.RUNNING

    try:
        await scheduler.prepare([spec])
        await scheduler.ensure(record, Epoch(1), spec)
        await eventually(runs)
        (node,) = await nomad.request("GET", "/v1/nodes")
        path = f"/v1/node/{node['ID']}/drain"
        before = await scheduler.snapshot()
        drain = {"Deadline": 3600 * 10**9, "IgnoreSystemJobs": True}
        await nomad.request("POST", path, {"DrainSpec": drain})
        try:
            assert not await scheduler.unchanged_since(before)
            reason = (await agent()).reason
            detail = await nomad.request("GET", f"/v1/node/{node['ID']}")
            until = detail["DrainStrategy"]["ForceDeadline"][:19]
            assert f"is being drained: at {until}Z at the latest" in reason
            (only,) = (await scheduler.snapshot([slug_of(record.device.id)])).placements.values()
            assert only[0].reason == reason
        finally:
            await nomad.request("POST", path, {"DrainSpec": None, "MarkEligible": True})
        found = await agent()
        assert (found.state, found.reason) == (PlacementState.RUNNING, "")
    finally:
        await scheduler.close()


@pytest.mark.servers
@pytest.mark.slow_because("starts a Nomad with two clients, and one of them twice")
@pytest.mark.asyncio(loop_scope="session")
async def test_a_client_that_lost_its_data_directory_is_named_by_both_ids(tmp_path: Path) -> None:
    """The client registers under its name with a new id, beside its old node. doctor names both
    ids, and the scheduler knows them."""
    async with NomadServer(tmp_path / "nomad", clients=2) as nomad:
        old = {one["ID"] for one in await nomad.request("GET", "/v1/nodes")}
        await nomad.kill(1)
        (nomad.data_dir / "data-1").rename(nomad.data_dir / "lost")
        await nomad.restart(1)

        async def twice() -> bool:
            nodes = await nomad.request("GET", "/v1/nodes")
            states = sorted(one["Status"] for one in nodes)
            # A slow new node may look like the one that is briefly down.
            down = {one["ID"] for one in nodes if one["Status"] == "down"}
            return states == ["down", "ready", "ready"] and down < old

        await eventually(twice)
        nodes = await nomad.request("GET", "/v1/nodes")
        (new,) = [one for one in nodes if one["ID"] not in old]
        (down,) = [one for one in nodes if one["Status"] == "down"]

        async def ask(method: str, path: str) -> tuple[int, object]:
            return 200, await nomad.request(method, path)

        found = {name: rest for name, *rest in await doctor_nodes.checks(ask)}
        assert found["nomad nodes"][1].startswith("2 of 3 take agents; the others: ")
        status, text, _ = found["nomad node names"]
        assert status == "warn"
        assert text.startswith(f"2 nodes are named {new['Name']}: ")
        assert f"{down['ID'][:8]} (down)" in text
        assert f"{new['ID'][:8]} (ready)" in text
        client = NomadClient(NomadAccess(address=nomad.http_addr))
        try:
            seen = NodeList(client)
            await seen.refresh()
            assert seen.now.twins() == [text]
            assert not await seen.changed()
        finally:
            await client.close()

"""A class that can't be prepared: its own devices wait with that reason, all others get their
agents."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nomad_watchdog.controllers.agents.reconciler import Reconciler
from nomad_watchdog.errors import UserError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import AgentSpec, Device, Limits, PlacementState
from nomad_watchdog.schedulers import check_spec
from nomad_watchdog.schedulers.nomad import NomadScheduler
from servers.nomad import NomadServer
from tests.schedulers.test_nomad import MOCK, mock_spec, scheduler
from tests.simulation.fakes import REFUSED, Cluster, FakeRegistry, FakeScheduler, Store
from tests.simulation.simulator import SPEC
from tests.simulation.virtual_time import VirtualClock, VirtualLoop

__all__ = ["scheduler"]
OTHER = replace(SPEC, agent_class="other", spec_hash="o")
GOOD, BAD = DeviceId("good"), DeviceId("bad")


@pytest.mark.servers
@pytest.mark.asyncio(loop_scope="session")
async def test_one_bad_class_of_nomad_keeps_no_other_back(
    scheduler: NomadScheduler, nomad: NomadServer
) -> None:
    """A misspelt variable, a missing node pool and a missing template are each reported with their
    class; the valid class gets its parent job."""
    specs = [
        replace(mock_spec(pol="gpu"), agent_class="misspelt"),
        replace(mock_spec(pool="nosuch"), agent_class="nowhere"),
        AgentSpec("missing", "1", "h", template="/nosuch.hcl"),
        replace(mock_spec(), agent_class="good"),
    ]
    refused = await scheduler.prepare(specs)
    assert sorted(refused) == ["missing", "misspelt", "nowhere"]
    assert "has no variable 'pol'; did you mean pool?" in refused["misspelt"]
    assert "nosuch" in refused["nowhere"]
    assert "pool" in refused["nowhere"]
    assert "No such file" in refused["missing"]
    jobs = [job["ID"] for job in await nomad.request("GET", "/v1/jobs")]
    prefix = scheduler._names.prefix
    assert [one for one in jobs if one.startswith(prefix)] == [f"{prefix}-good"]
    assert sorted(await scheduler.prepare([*specs[:1], mock_spec()])) == ["misspelt"]


@pytest.mark.parametrize(
    ("backend", "variables", "words"),
    [
        ("nomad", {"pyhton": "python3"}, "did you mean python?"),
        ("nomad", {"agent_sourc": "x"}, "did you mean agent_source?"),
        ("nomad", {"memroy": "1"}, "did you mean memory?"),
        ("kubernetes", {"imge": "x"}, "did you mean image?"),
        ("kubernetes", {"workload": "deploymnt"}, "allowed are"),
        ("local", {"comand": '["x"]'}, "did you mean command?"),
        ("local", {"command": "x"}, "not JSON"),
    ],
)
def test_a_variable_that_a_template_does_not_have_is_refused_without_a_server(
    backend: str, variables: dict[str, str], words: str
) -> None:
    """A variable that would be ignored silently is reported before anything runs (C6)."""
    with pytest.raises(UserError) as caught:
        check_spec(backend, AgentSpec("default", "1", "h", variables=variables))
    assert words in str(caught.value)


def test_variables_of_a_template_file_are_found_in_every_form(tmp_path: Path) -> None:
    """Variables are found with and without quotes, on one line and indented; a comment declares
    nothing."""
    file = tmp_path / "t.hcl"
    file.write_text('variable "one" {}\n  variable two { default = 1 }\n# variable "three" {}\n')
    spec = AgentSpec("default", "1", "h", template=str(file), variables={"one": "1", "two": "2"})
    check_spec("nomad", spec)
    with pytest.raises(UserError, match="it has one, two"):
        check_spec("nomad", replace(spec, variables={"three": "3"}))
    check_spec("nomad", AgentSpec("default", "1", "h", template=MOCK, variables={"pool": "x"}))


async def fleet_with(
    specs: dict[str, AgentSpec], unreadable: dict[str, str], later: dict[str, AgentSpec]
) -> dict[str, Any]:
    """A device of each class, checked after two minutes; `later`: the specs that are readable by
    then."""
    store, cluster = Store(), Cluster()
    store.initialise("test")
    clock = VirtualClock(asyncio.get_running_loop())
    fleet = Fleet(FakeRegistry(store), Limits(), clock)
    found: dict[str, Any] = {}
    readable = dict(specs)

    async def read() -> tuple[dict[str, AgentSpec], dict[str, str]]:
        return readable, {n: why for n, why in unreadable.items() if n not in readable}

    reconciler = Reconciler(
        fleet,
        FakeScheduler(cluster),
        specs,
        Metrics(),
        read_specs=read,
        unreadable=unreadable,
    )
    task = asyncio.ensure_future(reconciler.run())
    devices = [Device(GOOD, SPEC.agent_class, "127.0.0.1"), Device(BAD, "other", "127.0.0.2")]
    await fleet.records.register(devices)
    await asyncio.sleep(120.0)
    found["good"] = states(fleet, GOOD)
    found["bad"] = states(fleet, BAD)
    found["reason"] = reconciler.obstacle(slug_of(BAD))
    found["status"] = fleet.views.status()["unprepared_classes"]
    readable.update(later)
    await asyncio.sleep(120.0)
    found["bad later"] = states(fleet, BAD)
    found["events"] = [
        one.kind for one in fleet.events.own.recent() if one.kind.startswith("class.")
    ]
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    return found


def states(fleet: Fleet, device_id: DeviceId) -> list[PlacementState]:
    return [one.state for one in fleet.placements.get(slug_of(device_id), ())]


def test_a_refused_class_has_its_reason_in_status_and_for_its_devices() -> None:
    """If the scheduler rejects one class, the loop continues; its device has no agent and a
    reason."""
    refused = replace(OTHER, variables={REFUSED: "no such pool"})
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        found = runner.run(fleet_with({"default": SPEC, "other": refused}, {}, {}))
    assert found["good"] == [PlacementState.RUNNING]
    assert found["bad"] == found["bad later"] == []
    assert (
        "agent class 'other' can't be prepared: no such pool; it is tried again" in found["reason"]
    )
    assert found["status"] == {"other": "no such pool"}
    assert found["events"] == ["class.unprepared"]


def test_a_class_is_tried_again_until_its_template_is_there() -> None:
    """A template that can't be read at the start is read again, and its devices then get their
    agents."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        found = runner.run(
            fleet_with({"default": SPEC}, {"other": "t.hcl: no such file"}, {"other": OTHER})
        )
    assert found["good"] == [PlacementState.RUNNING]
    assert found["bad"] == []
    assert "can't be prepared: t.hcl: no such file" in found["reason"]
    assert found["bad later"] == [PlacementState.RUNNING]
    assert found["events"] == ["class.prepared"]


async def kept_while_refused() -> tuple[int, int]:
    """Epochs of a running agent before and after its class gets a spec that can't be prepared."""
    store, cluster = Store(), Cluster()
    store.initialise("test")
    clock = VirtualClock(asyncio.get_running_loop())
    epochs = []
    for spec in (SPEC, replace(SPEC, spec_hash="new", variables={REFUSED: "bad template"})):
        fleet = Fleet(FakeRegistry(store), Limits(), clock)
        reconciler = Reconciler(fleet, FakeScheduler(cluster), {"default": spec}, Metrics())
        task = asyncio.ensure_future(reconciler.run())
        await fleet.records.register([Device(GOOD, SPEC.agent_class, "127.0.0.1")])
        await asyncio.sleep(120.0)
        (one,) = fleet.placements[slug_of(GOOD)]
        assert one.state is PlacementState.RUNNING
        epochs.append(int(one.epoch))
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    return epochs[0], epochs[1]


def test_a_running_agent_is_not_replaced_by_a_version_that_cannot_be_prepared() -> None:
    """A broken new template stops nothing: the old agent keeps running at its epoch."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        before, after = runner.run(kept_while_refused())
    assert before == after

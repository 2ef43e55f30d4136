"""Repairs on real links: devices are network namespaces, and the agent cycles real interfaces. Needs root."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.agent.site import Device, Site, SiteAgent, a_site, ip
from tests.agent.world import AGENT, until


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    """A site with an API and a hook; both are removed at the end."""
    async with a_site(tmp_path) as it:
        yield it


async def ready(agent: SiteAgent) -> None:
    """Start the agent and wait until its device answers and its reports are accepted."""
    await agent.start()

    async def accepted() -> bool:
        status = await agent.status()
        return status["state"] == "ok" and status["reports"]["sent"] > 0

    await until(accepted, "accepted")


async def has(agent: SiteAgent, *outcomes: str) -> None:
    """Wait until all attempts have these outcomes."""

    async def check() -> bool:
        return await agent.outcomes() == list(outcomes)

    await until(check, f"attempts {outcomes}", 60.0)


async def test_a_cut_cable_is_repaired_and_a_dead_device_is_escalated_once(site: Site) -> None:
    """An agent whose interface was set down cycles it, and the device is back without an alert; one whose device is
    really dead escalates once, with the probes' results and the ladder's record."""
    cut, dead = await site.device(), await site.device()
    ip("-n", site.host.namespace, "route", "add", cut.beyond, "via", cut.host.address)
    mending, watching = site.agent(cut), site.agent(dead)
    await ready(mending)
    await ready(watching)
    cut.cut()
    dead.die()

    await has(mending, "recovered")
    await mending.is_in("back", state="ok")
    assert cut.is_up
    told = [r for r in site.peer.reports if r["device_id"] == mending.config["device_id"]]
    states = [r["state"] for r in told]
    assert "repairing" in states
    assert "offline" not in states
    (during, *_) = [r for r in told if r["state"] == "repairing"]
    assert during["reason"].startswith(f"repairing: interface {cut.link}")
    assert during["repairs"]["active"]

    (call,) = await until(lambda: site.hook.raised, "an escalation", 60.0)
    assert call["kind"] == "offline"
    assert call["devices"][0][0] == watching.config["device_id"]
    assert call["evidence"]["state"] == "offline"
    assert [a["outcome"] for a in call["evidence"]["repairs"]] == ["no help"]
    assert not call["evidence"]["probes"]["0:icmp"]["ok"]
    misses = (await watching.status())["misses"]
    await until(
        lambda: (r := site.peer.last)["misses"] > misses + 5 or r["state"] == "ok", "misses"
    )
    assert len(site.hook.raised) == 1
    assert await watching.outcomes() == ["no help"]

    dead.live()
    await until(lambda: [c for c in site.hook.calls if c["status"] == "resolved"], "cleared", 60.0)
    assert len(site.hook.raised) == 1


async def test_a_cycle_puts_back_what_the_kernel_takes_away(site: Site) -> None:
    """After a cycle, static routes over the interface and its IPv6 address are as before."""
    device = await site.device()
    space, link = site.host.namespace, device.link
    ip("-n", space, "addr", "add", "fd00:1::1/64", "dev", link, "nodad")
    ip("-n", space, "route", "add", device.beyond, "via", device.host.address, "metric", "7")
    ip("-n", space, "route", "add", "10.233.0.0/16", "dev", link)
    ip("-n", space, "-6", "route", "add", "fd00:2::/64", "via", "fd00:1::2")
    # A device that dies leaves the site's end up, so that its routes can be read.
    agent = site.agent(device)
    await ready(agent)

    def network() -> list[list[str]]:
        shown = [
            ip("-n", space, "route", "show", "dev", link),
            ip("-n", space, "-6", "route", "show", "dev", link),
            ip("-n", space, "-6", "-o", "addr", "show", "dev", link, "scope", "global"),
        ]
        words = ("linkdown", "proto kernel metric 256 pref medium")
        return [
            sorted(w for line in text.splitlines() if (w := line.replace(words[0], "").strip()))
            for text in shown
        ]

    before = network()
    device.die()
    await until(lambda: agent.kept()["undo"], "a cycle")
    await has(agent, "no help")
    device.live()
    await agent.is_in("back", state="ok")
    await until(lambda: network() == before, f"{network()} as {before}")


async def test_routes_over_a_link_without_carrier_are_put_back_too(site: Site) -> None:
    """A route that the kernel lists as dead, as over a link whose other end is gone, is restored too."""
    device = await site.device()
    space, link = site.host.namespace, device.link
    ip("-n", space, "route", "add", device.beyond, "via", device.host.address)
    device.die()

    def routes() -> str:
        return ip("-n", space, "route", "show", "dev", link)

    await until(lambda: routes().count("linkdown") == 2, "the kernel has noticed")
    text = (
        "import sys; from watchdog_agent.repairs import interface as r;"
        "undo = r.prepare({'interface': sys.argv[1]});"
        "r._link(r.socket.if_nametoindex(sys.argv[1]), up=False);"
        "print(r.restore(undo))"
    )
    argv = [str(w) for w in site.host.argv([sys.executable, "-c", text, link])]
    done = subprocess.run(
        argv, env={"PYTHONPATH": str(AGENT), "PATH": os.defpath}, capture_output=True, check=True
    )
    assert done.stdout.strip() == b"0"
    assert routes().count(device.beyond) == 1


async def test_a_flapping_cable_spends_the_budget(site: Site) -> None:
    """With a budget of two the third cut is not repaired but reported: the agent is unable, which says nothing about
    the device, so that it is not escalated as offline."""
    device = await site.device()
    agent = site.agent(device, {"budget": 2})
    await ready(agent)
    for number in (1, 2):
        device.cut()
        await has(agent, *["recovered"] * number)
        await agent.is_in("back", state="ok")
    device.cut()
    report = await site.peer.saw("unable", state="unable")
    assert "network is unreachable" in report["reason"]

    async def probed_at() -> float:
        return (await agent.status())["probes"]["0:icmp"]["at"]

    began = await probed_at()

    async def probed_on() -> bool:
        return await probed_at() > began + 1.0

    await until(probed_on, "ten more rounds")
    assert await agent.outcomes() == ["recovered"] * 2
    assert not device.is_up
    assert site.hook.calls == []


@pytest.mark.parametrize("where", ["class", "step"])
async def test_dry_run_changes_nothing(site: Site, where: str) -> None:
    """In a dry run the interface is not changed; the steps that would be taken are recorded and reported."""
    device = await site.device()
    if where == "class":
        agent = site.agent(device, repair_policy={"dry_run": True})
    else:
        agent = site.agent(device, {"dry_run": True})
    await ready(agent)
    device.cut()
    await has(agent, "dry run")
    await agent.is_in("unable", state="unable")
    assert not device.is_up
    assert "repairing" not in [r["state"] for r in site.peer.reports]
    assert [line for line in agent.log if line["msg"] == "would repair"]


async def test_s3_an_agent_that_is_not_accepted_does_not_repair(site: Site) -> None:
    """An agent whose reports are answered with 409 leaves the interface alone, and states why; once accepted, it
    repairs."""
    device = await site.device()
    agent = site.agent(device, beat_s=0.1)
    await ready(agent)
    site.peer.status, site.peer.headers = 409, "Retry-After: 1\r\n"
    refused = site.peer.refused
    await until(lambda: site.peer.refused > refused, "a 409")
    device.cut()

    async def blocked() -> bool:
        return "409" in (await agent.status())["repairs"]["blocked"]

    await agent.is_in("unable", state="unable")
    await until(blocked, "blocked")
    assert await agent.outcomes() == []
    assert site.hook.calls == []
    assert not device.is_up
    site.peer.status, site.peer.headers = 200, ""
    await has(agent, "recovered")
    assert device.is_up


async def test_s3_a_refused_agent_ends_without_a_repair(site: Site) -> None:
    """After 410 no further step is taken: the agent exits with 0, and the interface is unchanged."""
    device = await site.device()
    agent = site.agent(device, {"when": "offline"}, beat_s=60.0)
    await ready(agent)
    site.peer.status = 410
    device.cut()
    assert agent.process is not None
    assert await agent.process.wait(15.0) == 0
    assert not device.is_up
    assert agent.kept()["ladder"]["attempts"] == []


async def test_l3_an_accepted_agent_repairs_with_the_control_plane_away(site: Site) -> None:
    """If the agent was accepted at the last contact and the control plane is down now, the cable is repaired."""
    device = await site.device()
    agent = site.agent(device, repair_policy={"accepted_beats": 1})
    await ready(agent)
    await site.peer.stop()
    device.cut()
    await has(agent, "recovered")


async def test_l3_but_not_for_ever(site: Site) -> None:
    """After `alone_s` without an answer no step is taken, and the outage is escalated."""
    device = await site.device()
    agent = site.agent(device, repair_policy={"accepted_beats": 1, "alone_s": 0.5})
    await ready(agent)
    await site.peer.stop()

    async def blocked() -> bool:
        return "no answer of the control plane" in (await agent.status())["repairs"]["blocked"]

    await until(blocked, "alone for too long")
    device.die()
    await until(lambda: site.hook.raised, "an escalation")
    assert await agent.outcomes() == []
    assert device.is_up


async def after_a_kill(site: Site, agent: SiteAgent, device: Device, allowed: set[str]) -> None:
    """Start the agent again and expect the interface up, one attempt with an allowed outcome, one escalation."""
    agent.extra.pop("WATCHDOG_FAILPOINT", None)
    await agent.start()
    await until(lambda: device.is_up, "the interface is up")
    await until(lambda: site.hook.raised, "an escalation", 60.0)
    (outcome,) = await agent.outcomes()
    assert outcome in allowed
    assert device.is_up
    device.live()
    await agent.is_in("back", state="ok")
    assert len(site.hook.raised) == 1


@pytest.mark.parametrize(
    ("point", "allowed"),
    [
        ("kept", {"interrupted"}),
        ("taken", {"interrupted"}),
        ("ended", {"interrupted"}),
        ("remembered", {"no help"}),
    ],
)
async def test_a_kill_at_a_named_moment_neither_repeats_nor_forgets(
    site: Site, point: str, allowed: set[str]
) -> None:
    """Killed before, in or after the step, the next run does not repeat it, counts it, and has set the interface up
    again."""
    device = await site.device()
    agent = site.agent(device)
    agent.extra["WATCHDOG_FAILPOINT"] = f"repairs.{point}:kill"
    await ready(agent)
    device.die()
    assert agent.process is not None
    assert await agent.process.wait(15.0) == -signal.SIGKILL
    assert device.is_up is (point != "taken")
    await after_a_kill(site, agent, device, allowed)


@pytest.mark.parametrize("seed", range(6))
async def test_a_kill_at_any_moment_leads_to_the_same_end(site: Site, seed: int) -> None:
    """After a kill at a random moment of the ladder, the device is escalated once, and the step is taken once."""
    device = await site.device()
    agent = site.agent(device)
    await ready(agent)
    device.die()
    assert agent.process is not None
    with pytest.raises(TimeoutError):  # only the timing matters: the process does not end by itself
        await agent.process.wait(random.Random(seed).uniform(0.0, 1.6))
    await agent.process.kill()
    await after_a_kill(site, agent, device, {"interrupted", "no help"})


async def test_a_class_without_repairs_still_undoes_what_was_left(site: Site) -> None:
    """An interface that an earlier run left down is set up by a run whose class has no repairs."""
    device = await site.device()
    agent = site.agent(device)
    agent.extra["WATCHDOG_FAILPOINT"] = "repairs.taken:kill"
    await ready(agent)
    device.die()
    assert agent.process is not None
    await agent.process.wait(15.0)
    assert not device.is_up
    del agent.config["repairs"], agent.extra["WATCHDOG_FAILPOINT"]
    await agent.start()
    assert device.is_up


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_in_the_middle_of_a_cycle_leaves_the_interface_up(
    site: Site, number: signal.Signals
) -> None:
    """After a signal while the link is down, the agent sets it up, saves the attempt, sends its last report, and exits
    in time."""
    device = await site.device()
    agent = site.agent(device, {"timeout_s": 60.0})
    await ready(agent)
    device.die()
    await until(lambda: not device.is_up, "the cycle has begun")
    assert await agent.signal(number, 3.0) == 128 + number
    assert device.is_up
    kept = agent.kept()
    assert kept["undo"] is None
    assert [a["outcome"] for a in kept["ladder"]["attempts"]] == ["verifying"]
    assert site.peer.last["stopping"] is True


async def test_a_second_signal_does_not_leave_it_down_either(site: Site) -> None:
    """Two signals in a row end the agent at once, and the interface is still up."""
    device = await site.device()
    agent = site.agent(device)
    await ready(agent)
    device.die()
    await until(lambda: not device.is_up, "the cycle has begun")
    assert agent.process is not None
    agent.process.send(signal.SIGTERM)
    assert await agent.signal(signal.SIGTERM) == 143
    assert device.is_up


async def test_an_interface_that_is_not_there_is_a_failed_step(site: Site) -> None:
    """A wrong interface name is a failed attempt with the reason, and the device is escalated."""
    device = await site.device()
    agent = site.agent(device, {"interface": "nothing0"})
    await ready(agent)
    device.die()
    (call,) = await until(lambda: site.hook.raised, "an escalation", 60.0)
    (attempt,) = call["evidence"]["repairs"]
    assert attempt["outcome"] == "failed"
    assert "no interface with this name" in attempt["reason"]

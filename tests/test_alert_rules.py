"""When the alerts fire, and when they do not, by Prometheus' own rule engine (`promtool test rules`)."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from servers.binaries import find
from tests.test_alerts import ALERTMANAGER, RULES, rules

pytestmark = [pytest.mark.servers, pytest.mark.long, pytest.mark.lasts(10)]
STEP_S = 30
Series = dict[str, str]
"""Name with labels -> values in promtool's notation, one every STEP_S."""


def one(name: str, values: str, labels: str = "") -> Series:
    """A series of one replica."""
    return {f'nomad_watchdog_{name}{{job="w",instance="a"{labels and ","}{labels}}}': values}


def gauge(name: str, labels: str = "", good: int = 0, bad: int = 1) -> Series:
    """Good for two minutes, then bad."""
    return one(name, f"{good}x4 {bad}x900", labels)


def counter(name: str, labels: str = "", step: int = 1) -> Series:
    """Constant for two minutes, then rising."""
    return one(name, f"0x4 {step}+{step}x900", labels)


FIRING: dict[str, tuple[Series, int, int]] = {
    # alert: series that are bad from 2 min on, seconds from then until it may not fire yet, and until it must
    "DeviceOffline": (gauge("devices", 'verdict="offline"'), 0, 60),
    "DeviceDegraded": (gauge("devices", 'verdict="degraded"'), 30, 90),
    "DeviceUnwatched": (gauge("devices", 'verdict="unwatched"'), 270, 330),
    "AgentsUnheard": (gauge("unheard_agents", 'reason="silent"'), 30, 90),
    "AgentsUnlisted": (gauge("unlisted_agents"), 270, 330),
    "PlacementsStalled": (gauge("stalled_placements"), 570, 630),
    "IncidentOpen": (gauge("incidents_open", 'group="site"'), 0, 60),
    "FleetShrinkBlocked": (gauge("breaker_held"), 30, 90),
    "DeparturesHeld": (gauge("departures_held"), 30, 90),
    "InventoryBad": (gauge("inventory_problems"), 270, 330),
    "ConfigRejected": (gauge("config_problem"), 270, 330),
    "ConfigurationsDiffer": (gauge("config_differs"), 870, 930),
    "DispatchErrors": (counter("dispatches_total", 'outcome="failed"', 6), 270, 480),
    "BacklogAge": (gauge("queue_oldest_seconds", bad=121), 90, 150),
    "AgentFenced": (counter("reports_total", 'outcome="refused"', 4), 30, 240),
    "UnsafeStarts": (counter("unsafe_starts_total"), -30, 60),
    "SnapshotStale": (gauge("snapshot_age_seconds", bad=181), 30, 90),
    "RegistryUnreadable": (gauge("registry_unreadable"), 30, 90),
    "RegistryUnwritable": (gauge("registry_unwritable"), 30, 90),
    "RegistryRestored": (counter("registry_restores_total"), -30, 60),
    "EventsDropped": (gauge("events_stored", good=1, bad=0), 30, 90),
    "RolloutGivenUp": (gauge("rollouts_given_up"), 30, 90),
    "DrainWaits": (gauge("drain_waiting_hosts"), 90, 150),
    "ReliefImpossible": (gauge("relief_impossible"), 270, 330),
    "ControlPlaneDown": (one("build_info", "1x4 stale _x900"), 150, 210),
    "ShardsWithoutHolder": (one("shards", "4x900") | gauge("shards_held", good=4, bad=3), 90, 150),
    "KnownShareLow": (
        one("devices", "100x4 50x900", 'verdict="watched"')
        | gauge("devices", 'verdict="unwatched"', bad=50),
        3300,
        3900,
    ),
}  # fmt: skip
BAD_FROM_S = 120
EVERYTHING: Series = {
    name: values for series, _, _ in FIRING.values() for name, values in series.items()
}
HEALTHY: Series = {
    # the first of its values for ever, but for the minute of a restart
    name: f"{values.split('x')[0]}x20 _x2 {values.split('x')[0]}x60"
    for name, values in EVERYTHING.items()
}


def expects(alert: str, at_s: int, firing: int) -> dict[str, object]:
    """A check of the number of alerts that fire at a moment."""
    samples = [{"labels": "{}", "value": firing}] if firing else []
    expression = f'count(ALERTS{{alertname=~"{alert}",alertstate="firing"}})'
    return {"expr": expression, "eval_time": f"{at_s}s", "exp_samples": samples}


def case(name: str, series: Series, checks: Sequence[dict[str, object]]) -> dict[str, object]:
    return {
        "name": name,
        "interval": f"{STEP_S}s",
        "input_series": [{"series": key, "values": values} for key, values in series.items()],
        "promql_expr_test": list(checks),
    }


async def passes(folder: Path, cases: Sequence[dict[str, object]]) -> None:
    """Have Prometheus' rule engine run the cases."""
    file = folder / "test.yml"  # JSON is YAML
    tests = {"rule_files": [str(RULES)], "evaluation_interval": f"{STEP_S}s", "tests": list(cases)}
    file.write_text(json.dumps(tests))
    program = await asyncio.to_thread(find, "promtool")
    argv = [str(program), "test", "rules", str(file)]
    done = await asyncio.to_thread(
        subprocess.run, argv, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


async def test_each_alert_fires_when_it_must_and_not_before(tmp_path: Path) -> None:
    """Each one, after the time that its rule waits."""
    assert FIRING.keys() == {rule["alert"] for rule in rules()}
    await passes(
        tmp_path,
        [
            case(
                alert,
                series,
                [
                    expects(alert, BAD_FROM_S - STEP_S, 0),
                    expects(alert, BAD_FROM_S + not_yet_s, 0),
                    expects(alert, BAD_FROM_S + must_s, 1),
                ],
            )
            for alert, (series, not_yet_s, must_s) in FIRING.items()
        ],
    )


async def test_a_restart_of_a_healthy_control_plane_is_silent(tmp_path: Path) -> None:
    """While Prometheus gets no answer for a minute, and when counters begin again, nothing fires."""
    checks = [expects(".+", at_s, 0) for at_s in range(0, 2400, STEP_S)]
    await passes(tmp_path, [case("restart", HEALTHY, checks)])


async def test_an_outage_keeps_firing_across_a_restart_and_a_fail_over(tmp_path: Path) -> None:
    """One minute without an answer, or another replica instead, resolves nothing. An outage that is over ends the
    alert."""
    offline = 'verdict="offline"'
    other = {f'nomad_watchdog_devices{{job="w",instance="b",{offline}}}': "_x20 1x20 0x40"}
    firing = [expects("DeviceOffline", at_s, 1) for at_s in range(120, 630, STEP_S)]
    await passes(
        tmp_path,
        [
            case(
                "restart",
                one("devices", "1x20 _x1 1x20 0x40", offline),
                [*firing, expects("DeviceOffline", 1800, 0)],
            ),
            case(
                "fail-over",
                one("devices", "1x20 stale", offline) | other,
                [*firing, expects("DeviceOffline", 690, 2), expects("DeviceOffline", 1800, 0)],
            ),
        ],
    )


async def test_short_disturbances_are_silent(tmp_path: Path) -> None:
    """What is over before its time fires nothing."""
    alerts = {rule["alert"]: rule["for"] for rule in rules() if rule.get("for", "30s") != "30s"}
    brief = {
        alert: {
            key: values.replace("x900", "x0") + " " + values.split("x")[0] + "x40"
            for key, values in series.items()
        }
        for alert, (series, _, _) in FIRING.items()
        if alert in alerts and "+" not in str(series)
    }
    assert len(brief) > 15
    await passes(
        tmp_path,
        [
            case(alert, series, [expects(alert, at_s, 0) for at_s in range(0, 900, STEP_S)])
            for alert, series in brief.items()
        ],
    )


async def test_alertmanager_takes_its_file_and_wakes_somebody_for_critical_alerts() -> None:
    """Alertmanager's own parser accepts the file, and routes each alert by its severity."""
    program = str(await asyncio.to_thread(find, "amtool"))

    def run(*argv: str) -> str:
        done = subprocess.run(
            [program, *argv], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    assert "SUCCESS" in await asyncio.to_thread(run, "check-config", str(ALERTMANAGER))
    receivers = {"warning": "operators", "critical": "on-call"}
    for rule in rules():
        labels = [f"alertname={rule['alert']}", f"severity={rule['labels']['severity']}"]
        argv = ["config", "routes", "test", f"--config.file={ALERTMANAGER}", *labels]
        assert await asyncio.to_thread(run, *argv) == receivers[rule["labels"]["severity"]]


async def test_the_first_moments_of_a_fleet_are_no_outage_of_a_month(tmp_path: Path) -> None:
    """All devices are unwatched for the first half minute; and one of two fleets is down."""
    young = one("devices", "0x1 100x60", 'verdict="watched"') | one(
        "devices", "100x1 0x60", 'verdict="unwatched"'
    )
    two = one("build_info", "1x4 stale _x60") | {
        'nomad_watchdog_build_info{job="other",instance="b"}': "1x60"
    }
    await passes(
        tmp_path,
        [
            case(
                "young", young, [expects("KnownShareLow", at_s, 0) for at_s in range(0, 1800, 60)]
            ),
            case(
                "two",
                two,
                [expects("ControlPlaneDown", 120, 0), expects("ControlPlaneDown", 400, 1)],
            ),
        ],
    )

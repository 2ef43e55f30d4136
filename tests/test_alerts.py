"""The alert rules name existing metrics, and each alert has its runbook."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from nomad_watchdog.metrics import Metrics

ROOT = Path(__file__).parents[1]
RULES = ROOT / "jobs" / "prometheus" / "nomad-watchdog.rules.yml"
ALERTMANAGER = RULES.with_name("alertmanager.yml")
RUNBOOKS = ROOT / "docs" / "runbooks.md"
WANTED = {
    "DeviceOffline",
    "DeviceDegraded",
    "DeviceUnwatched",
    "AgentsUnheard",
    "AgentsUnlisted",
    "PlacementsStalled",
    "IncidentOpen",
    "FleetShrinkBlocked",
    "DeparturesHeld",
    "InventoryBad",
    "ConfigRejected",
    "ConfigurationsDiffer",
    "DispatchErrors",
    "BacklogAge",
    "AgentFenced",
    "UnsafeStarts",
    "SnapshotStale",
    "RegistryUnreadable",
    "RegistryUnwritable",
    "RegistryRestored",
    "EventsDropped",
    "RolloutGivenUp",
    "DrainWaits",
    "ReliefImpossible",
    "ControlPlaneDown",
    "ShardsWithoutHolder",
    "KnownShareLow",
}


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


def records() -> list[dict[str, Any]]:
    """The recording rules."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"] if "record" in rule]


def test_alerts_and_runbooks_agree() -> None:
    """Each alert has its heading in the runbooks, and each heading its alert."""
    headings = re.findall(r"^## (\w+)$", RUNBOOKS.read_text(), re.MULTILINE)

    assert [rule["alert"] for rule in rules()] == headings
    assert set(headings) == WANTED


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_asks_for_series_that_exist(rule: dict[str, Any]) -> None:
    """Every metric in the expression is exposed, with the labels and label values that it selects, so that the alert
    can fire at all."""
    exposed = Metrics().render().decode()
    expression = rule["expr"]
    for record in records():
        expression = expression.replace(record["record"], f"({record['expr']})")
    asked = re.findall(r"(nomad_watchdog_\w+)(?:\{([^}]*)\})?", expression)

    assert asked
    for metric, selector in asked:
        series = re.findall(rf"^{metric}(?:\{{(.*)\}})? ", exposed, re.MULTILINE)
        assert series, metric
        for label, _, values in re.findall(r'(\w+)(=~?)"([^"]*)"', selector):
            for value in values.split("|"):
                assert any(f'{label}="{value}"' in one for one in series), (metric, label, value)


OUTAGES = {"DeviceOffline", "DeviceDegraded", "DeviceUnwatched", "AgentsUnheard", "IncidentOpen"}


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_says_how_bad_it_is_and_where_to_read_on(rule: dict[str, Any]) -> None:
    """Severity, a summary in one line, and a link to its own section; nothing else. An alert for an outage keeps firing
    while a control plane restarts."""
    assert set(rule) <= {"alert", "expr", "for", "keep_firing_for", "labels", "annotations"}
    assert ("keep_firing_for" in rule) is (rule["alert"] in OUTAGES)
    assert rule["labels"]["severity"] in {"warning", "critical"}
    assert set(rule["annotations"]) == {"summary", "runbook"}
    assert "\n" not in rule["annotations"]["summary"]
    assert rule["annotations"]["runbook"] == f"docs/runbooks.md#{rule['alert'].lower()}"


def test_inhibition_names_alerts_that_exist() -> None:
    """Every alert in the rules for Alertmanager is one of ours, and none inhibits itself."""
    named: set[str] = set()
    for rule in yaml.safe_load(ALERTMANAGER.read_text())["inhibit_rules"]:
        source, target = (
            {name for one in rule[side] for name in re.findall(r"[A-Z]\w+", one)}
            for side in ("source_matchers", "target_matchers")
        )
        assert not source & target
        named |= source | target
    assert named < WANTED
    assert "DeviceOffline" in named

"""The table of the agent's settings: the agent and the control plane accept the same values."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from watchdog_agent.config import document as agent_document
from watchdog_agent.config import optional_table, table
from watchdog_agent.config.document import ConfigError

from nomad_watchdog.config.agent_classes import AgentClassSettings, RepairSettings
from nomad_watchdog.config.escalation import EscalationSettings, LokiSettings, SinkSettings
from nomad_watchdog.config.probes import GatewaySettings, ProbeSettings
from nomad_watchdog.config.types import Block
from tests.agent.world import document, probe

AGENT_ONLY = {"register_every_s", "note_s"}
"""Settings that no configuration file has."""
URL = "http://127.0.0.1:8080"
MQTT = {"kind": "mqtt", "topic": "a", "broker": "b"}
Case = tuple[str, Any, type[Block], dict[str, Any], str]
"""Name, rule, the control plane's block, required other settings, and the place in the agent's document."""


def table_cases() -> Iterator[Case]:
    """Each setting of the table, with its place on both ends."""
    places: list[tuple[type, type[Block], dict[str, Any], str]] = [
        (table.AgentTable, AgentClassSettings, {}, ""),
        (table.ProbeTable, ProbeSettings, {"kind": "icmp"}, "probes"),
        (table.HttpProbe, ProbeSettings, {"kind": "http", "port": 80}, "probes"),
        (optional_table.TlsProbe, ProbeSettings, {"kind": "tls", "verify": False}, "probes"),
        (optional_table.FileProbe, ProbeSettings, {"kind": "file", "file": "/x", "expect_text": "x"}, "probes"),
        (optional_table.Mqtt, ProbeSettings, {"kind": "mqtt", "user": "u"}, "probes"),
        (optional_table.Mqtt, RepairSettings, MQTT, "repairs"),
        (optional_table.SnmpProbe, ProbeSettings, {"kind": "snmp"}, "probes"),
        (optional_table.DnsProbe, ProbeSettings, {"kind": "dns", "name": "a"}, "probes"),
        (optional_table.Repair, RepairSettings, {"kind": "unit", "unit": "a"}, "repairs"),
        (optional_table.RepairHttp, RepairSettings, {"kind": "http", "url": URL}, "repairs"),
        (optional_table.RepairPolicyTable, AgentClassSettings, {}, "repair_policy"),
        (optional_table.GatewayTable, GatewaySettings, {"address": "10.0.0.1"}, "gateway"),
        (optional_table.Escalate, EscalationSettings, {"sink": [{"kind": "webhook", "url": URL}]}, "escalate"),
        (optional_table.SinkTable, SinkSettings, {"kind": "consul_event", "url": URL}, "sinks"),
        (optional_table.Loki, LokiSettings, {"url": URL}, "loki"),
    ]  # fmt: skip
    for rules, block, others, place in places:
        for name, rule in vars(rules).items():
            if name[0] != "_" and name not in AGENT_ONLY:
                yield name, rule, block, others, place
    for kind, name in optional_table.TARGETS.items():
        if kind != "http":
            others = {**MQTT} if kind == "mqtt" else {"kind": kind}
            yield name, vars(optional_table.RepairTarget)[name], RepairSettings, others, "repairs"
    yield "plugin", optional_table.PLUGIN, ProbeSettings, {"kind": "plugin"}, "probes"
    yield "command", optional_table.COMMAND, ProbeSettings, {"kind": "command"}, "probes"
    yield "port", table.PORT, ProbeSettings, {"kind": "tcp"}, "probes"
    yield "expect_status", table.STATUS, ProbeSettings, {"kind": "http", "port": 80}, "probes"


CASES = list(table_cases())


def values(rule: Any) -> st.SearchStrategy[Any]:
    """Values in and around the bounds of a rule, and of other types."""
    odd = st.sampled_from([True, False, "", "x", 0, 1, [], {}])
    if isinstance(rule, table.Range):
        edges = [
            rule.low,
            rule.high,
            rule.low - 1,
            rule.high + 1,
            rule.low * 0.99,
            rule.high * 1.01,
        ]
        whole = st.integers(int(rule.low) - 2, int(rule.high) + 2)
        real = st.floats(rule.low - 1, rule.high * 1.1, allow_nan=False)
        return st.one_of(odd, whole, real, st.sampled_from([*edges, int(rule.high), 10**30]))
    if isinstance(rule, table.Choice):
        return st.one_of(odd, st.sampled_from([*rule.words, rule.words[0].upper(), "none"]))
    if isinstance(rule, optional_table.Command):
        word = st.sampled_from(["a", "", "\0", "x y", "é", "x" * 1024, "x" * 1025])
        return st.one_of(odd, st.lists(word, max_size=3), st.just(["x"] * 64), st.just(["x"] * 65))
    if isinstance(rule, table.TextRule):
        allowed = "".join(sorted(rule.allowed or "aZ0 _"))
        good = st.text(st.sampled_from(allowed), max_size=12)
        text = st.text(st.sampled_from(allowed + "/:+#.-_@ \n\0é"), max_size=20)
        long = st.sampled_from(["/" + "a" * n for n in (rule.most - 2, rule.most - 1, rule.most)])
        more = st.sampled_from(
            ["00:11:22:aa:bb:cc", "00-11-22-aa-bb-cc", "00:11:22:aa:bb:cg", "/x", "x" * rule.most]
        )
        return st.one_of(odd, good, text, good.map(lambda one: "/" + one), long, more)
    return odd


def control_plane_accepts(block: type[Block], name: str, given: dict[str, Any]) -> bool:
    """Whether no error names this setting; an error about a contradiction names the block."""
    try:
        block.model_validate(given)
    except ValidationError as error:
        return not any(one["loc"][:1] == (name,) for one in error.errors())
    return True


def agent_accepts(part: dict[str, Any], place: str) -> bool:
    """Whether the agent accepts a document with this part in this place."""
    parts: dict[str, Any] = {
        "": part,
        "probes": {"probes": [part]},
        "repairs": {"repairs": [part]},
        "repair_policy": {"repairs": [{"kind": "unit", "unit": "a"}], "repair_policy": part},
        "gateway": {"gateway": part},
        "escalate": {"escalate": {"sinks": [{"kind": "webhook", "url": URL}], **part}},
        "sinks": {"escalate": {"sinks": [part]}},
        "loki": {"loki": part},
    }
    try:
        agent_document.check(copy.deepcopy({**document(probes=[probe(80)]), **parts[place]}))
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case[4]}-{case[3].get('kind', '')}-{case[0]}"
)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_both_ends_accept_and_reject_the_same_values(case: Case, data: st.DataObject) -> None:
    """For every setting of the table, a value is accepted by both ends or rejected by both."""
    name, rule, block, others, place = case
    value = data.draw(values(rule))
    short = ("repair_" if place == "repair_policy" else "") + name.removesuffix("_s")
    # A configuration file writes a duration as text; seconds are given as a float.
    is_duration = name.endswith("_s") and type(value) is int
    there = float(value) if is_duration else value
    ours = {k: v for k, v in others.items() if k != "sink"}
    agent = agent_accepts({**ours, name: value}, place)
    assert control_plane_accepts(block, short, {**others, short: there}) == agent


def test_every_setting_of_the_table_has_its_default_on_both_ends() -> None:
    """A setting that a file omits has one default, filled in by the agent or sent by the control plane."""
    for name, rule, block, _, place in CASES:
        default = getattr(rule, "default", None)
        short = ("repair_" if place == "repair_policy" else "") + name.removesuffix("_s")
        ours = block.model_fields[short].default
        assert ours is None or ours == default, (name, ours, default)

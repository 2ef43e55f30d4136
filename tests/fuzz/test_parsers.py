"""Every parser of both programs, given hostile numbers, strings and nesting: a value or its own error, and quickly.

`make test` gives each parser a few dozen inputs, `make test-all` some thousands.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from watchdog_agent.config import document as config
from watchdog_agent.consul import kv
from watchdog_agent.errors import ConfigError
from watchdog_agent.escalation import election
from watchdog_agent.probes import mqtt5
from watchdog_agent.repairs import ladder
from watchdog_agent.reporting import reporter
from watchdog_agent.runtime import address, http_response, parsing
from watchdog_agent.runtime import http as agent_http
from watchdog_agent.runtime import state_file as agent_state
from watchdog_agent.runtime.address import AddressError
from watchdog_agent.runtime.http_response import HttpError

from nomad_watchdog import device_address, device_fields, secret_file_rules
from nomad_watchdog.api import body, pagination, schemas
from nomad_watchdog.api.errors import RequestError
from nomad_watchdog.cli import plan, status
from nomad_watchdog.clients import (
    _kubernetes_credentials,
    _kubernetes_errors,
    consul,
    hashicorp_environment,
    nomad_features,
    prometheus,
)
from nomad_watchdog.clients.consul import KvRow
from nomad_watchdog.clock import SystemClock
from nomad_watchdog.config import class_set, load
from nomad_watchdog.config.types import checked_listen
from nomad_watchdog.controllers import inventory_file, migration_state, rebalance_state, rollout
from nomad_watchdog.core import agent_token, webhook_signature
from nomad_watchdog.core.rebalance import Rebalance
from nomad_watchdog.errors import TerminalError, TransientError, UserError
from nomad_watchdog.events import _sql as event_sql
from nomad_watchdog.events import merged_log
from nomad_watchdog.fleet import pauses
from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.labels import parse_labels
from nomad_watchdog.model import AgentSpec, WallTime
from nomad_watchdog.pools import _kubernetes_objects, local
from nomad_watchdog.registry import backup, codec, epoch_floor
from nomad_watchdog.replicas.file_lease import FileLeases
from nomad_watchdog.replicas.lease_keys import LeaseKeys
from nomad_watchdog.schedulers.kubernetes import _budgets, names, namespaces, objects
from nomad_watchdog.schedulers.kubernetes._view import identity
from nomad_watchdog.schedulers.local import _placement, files
from nomad_watchdog.units import parse_duration, parse_size

NUMBERS = [
    "9" * 5000,
    "-" + "9" * 5000,
    "9" * 4300,
    "9" * 21,
    str(2**64),
    str(2**63),
    "1e999",
    "-1e999",
    "1e-999",
    "0." + "1" * 5000,
    "NaN",
    "Infinity",
    "-Infinity",
    "٣",
    "²",
    "0x10",
    "1_000",
    " 1",
    "1\n",
    "+1",
    "-0",
    "007",
    "",
]
TOKENS = [
    *NUMBERS,
    '"' + "x" * 70_000 + '"',
    '"\\ud800"',
    '"\\u0000"',
    '"\x1b[31m"',
    "[" * 5000,
    "[" * 500 + "]" * 500,
    "[" * 100 + "]" * 100,
    '{"a":' * 300 + "1" + "}" * 300,
    "true",
    "null",
    "{}",
    "[]",
]
numbers = st.sampled_from(NUMBERS) | st.text(max_size=40) | st.integers().map(str)
tokens = st.sampled_from(TOKENS) | st.text(max_size=20)

AGENT = {
    "v": 1,
    "device_id": "a",
    "slug": "a",
    "epoch": 1,
    "address": "127.0.0.1",
    "beat_s": 1.0,
    "labels": {"gateway": "10.0.0.1"},
    "gateway": {"kind": "tcp", "port": 1},
    "probes": [{"kind": "http", "port": 80, "interval_s": 1, "misses": 3, "expect_status": 200}],
    "confirm": [{"kind": "tls", "port": 443, "warn_days": 3}],
    "repairs": [{"kind": "wake", "mac": "00:00:00:00:00:01", "to": "10.0.0.1:9", "budget": 2}],
    "escalate": {"sinks": [{"kind": "webhook", "url": "http://127.0.0.1:1/"}], "retry_s": 1},
}
BODY = {"address": "127.0.0.1", "class": "default", "labels": {"a": "b"}, "ttl": "1m"}
REPORT = {
    "v": 1,
    "device_id": "a",
    "epoch": 1,
    "instance": "i",
    "sequence": 1,
    "ready": True,
    "state": "ok",
    "was_ready": True,
    "misses": 0,
    "confirmed": False,
    "listen": "127.0.0.1:1",
    "state_age_s": 1.5,
    "pressure": {"cpu": {"avg10": 1.5, "avg60": 0.8}, "unreadable": "u"},
}
DEVICE = {"id": "a", "address": "127.0.0.1", "class": "default", "labels": {"a": "b"}, "ttl": "1m"}
EVENT = {
    "id": "o:1",
    "at": 1.0,
    "seq": 1,
    "kind": "k",
    "device": "a",
    "slug": "a",
    "text": "",
    "origin": "o",
}
RECORD = {"format": "nomad-watchdog registry", "v": 1, "installation": "x", "records": 0}
KEPT = {
    "episode": 1,
    "count": 1,
    "open": True,
    "escalated": False,
    "attempts": [],
    "times": {"a": [1.5]},
}
PAUSES = {
    "v": 1,
    "pauses": [
        {
            "id": "p",
            "devices": ["d"],
            "class": "",
            "labels": {},
            "begins": 1.0,
            "ends": None,
            "reason": "",
            "by": "",
            "window": False,
        }
    ],
}
MIGRATIONS = {"v": 1, "base": "a", "backends": ["a"], "moves": []}
REBALANCES = {
    "v": 1,
    "rebalance": {
        **rebalance_state.rebalance_json(Rebalance("r", WallTime(1.0), "me")),
        "going": {"d": {"ref": "r", "epoch": 1, "host": "n"}},
        "marks": "AAAAAAA=",
        "avoid": ["n"],
        "useful": 0,
        "useless": 0,
        "unusable": [],
    },
}
CLASSES = {
    "v": 1,
    "number": 1,
    "digest": "d",
    "superseded": [],
    "by": "r",
    "since": 1.0,
    "sum": "s",
    "parts": [],
    "body": "",
}
PROMETHEUS = {"status": "success", "data": {"resultType": "scalar", "result": [1, "2"]}}
PLUGIN = {"status": {"token": "t", "expirationTimestamp": "2026-01-01T00:00:00+00:00"}}
ENTRY = {
    "device_id": "a",
    "epoch": 1,
    "agent_class": "c",
    "spec_hash": "s",
    "instance": "i",
    "argv": ["a"],
    "state": "running",
    "created_at": 1.0,
}
CONSUL = [{"Key": "a/b", "Value": "e30=", "ModifyIndex": 1, "Session": ""}]
LABELS = {names.SLUG: slug_of(DeviceId("a")), names.WORKLOAD: "pod", names.CLASS: "c"}
HCL = """\
resync = "5s"
shards = 5
api {
  listen = "127.0.0.1:50"
}
agent_class "default" {
  memory = "64Mi"
  probe "tcp" {
    port = 5
    interval = "5s"
  }
}
"""
DEVICES = 'device "a" {\n  address = "127.0.0.1"\n  ttl = "5s"\n  labels = { a = "5" }\n}\n'


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values in a document that can be replaced, including the whole document."""
    found = [path]
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, one in items:
        found += places(one, (*path, key))
    return found


def mangled(value: Any, path: tuple[Any, ...], token: str, at: tuple[Any, ...] = ()) -> str:
    """The JSON of a document with this token in one place."""
    if at == path:
        return token
    if isinstance(value, dict):
        inner = ((k, mangled(v, path, token, (*at, k))) for k, v in value.items())
        return "{" + ",".join(f"{json.dumps(k)}:{v}" for k, v in inner) + "}"
    if isinstance(value, list):
        return "[" + ",".join(mangled(v, path, token, (*at, n)) for n, v in enumerate(value)) + "]"
    return json.dumps(value)


def with_token(document: Any) -> st.SearchStrategy[str]:
    """The JSON of a document with a hostile token in one place."""
    return st.builds(
        lambda path, token: mangled(document, path, token),
        st.sampled_from(places(document)),
        tokens,
    )


def with_number(template: str) -> st.SearchStrategy[str]:
    """A text in which one "5" is replaced by a hostile token."""
    parts = template.split("5")
    return st.builds(
        lambda at, token: "5".join(parts[: at + 1]) + token + "5".join(parts[at + 1 :]),
        st.integers(0, len(parts) - 2),
        tokens,
    )


def printed(text: str) -> str:
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def in_file(folder: Path, name: str, read: Callable[[Path], Any]) -> Callable[[str], Any]:
    """A parser that reads a file."""
    path = folder / name

    def parse(text: str) -> Any:
        path.write_text(printed(text), newline="")
        return read(path)

    return parse


def response(data: str) -> Any:
    reader = http_response.Reader(http_response.MAX_BODY)
    found = reader.feed(data.encode("utf-8", "replace"))
    return found or reader.feed(b"")


def request(data: str) -> bytes:
    """The answer of the agent's own server to these bytes."""
    server = agent_http.Server.__new__(agent_http.Server)
    server.names, server.answer = ("localhost",), lambda *_: None
    return server._reply(data.encode("utf-8", "replace").split(b"\r\n\r\n", 1)[0].split(b"\r\n"))


def identity_with(epoch: str) -> Any:
    labels = {**LABELS, names.EPOCH: epoch}
    return identity({"metadata": {"labels": labels, "annotations": {names.DEVICE_ID: "a"}}})


def sudo_of(number: str) -> Any:
    with pytest.MonkeyPatch.context() as patched:
        for name in ("SUDO_UID", "SUDO_GID"):
            patched.setenv(name, printed(number).replace("\0", ""))
        return secret_file_rules.owners(), secret_file_rules.groups()


def restored(text: str) -> None:
    one = ladder.Ladder([{"id": "a", "kind": "wake", "budget": 1}])
    one.restore(parsing.loads(text), 1.0, 1.0)


def lease_file(path: Path) -> FileLeases:
    return FileLeases(path, shards=1, replica="r", api="", clock=SystemClock())


def spec_with(command: str) -> AgentSpec:
    return AgentSpec("c", "1", "h", variables={"command": command})


@dataclass(frozen=True, slots=True)
class Parser:
    name: str
    make: Callable[[Path], Callable[[str], Any]]
    errors: tuple[type[Exception], ...]
    inputs: st.SearchStrategy[str]


def plain(name: str, parse: Callable[[str], Any], inputs: Any, *errors: type[Exception]) -> Parser:
    return Parser(name, lambda _folder: parse, errors, inputs)


def file(
    name: str, of: str, read: Callable[[Path], Any], inputs: Any, *errors: type[Exception]
) -> Parser:
    return Parser(name, lambda folder: in_file(folder, of, read), errors, inputs)


def body_of(model: Any) -> Callable[[str], Any]:
    return lambda text: body.parsed(text.encode("utf-8", "replace"), model)


LAX = (ValueError, KeyError, TypeError, AttributeError)
"""For parsers whose caller catches these."""
HEADS = [
    "HTTP/1.1 5 OK\r\nContent-Length: 5\r\n\r\nhello",
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
]
PARSERS = [
    plain("whole", parsing.whole, numbers, ValueError),
    plain("finite", parsing.finite, numbers, ValueError),
    plain("JSON", parsing.loads, with_token(AGENT), ValueError),
    plain("agent: document", lambda text: config.check(parsing.loads(text)), with_token(AGENT), ValueError, ConfigError),
    plain("agent: listen", lambda text: config.listen_of({"WATCHDOG_LISTEN": text}), numbers.map("h:{}".format), ConfigError),
    plain("agent: address", address.checked, numbers, AddressError),
    plain("agent: endpoint", address.endpoint, numbers.map("h:{}".format), AddressError),
    plain("agent: URL", lambda text: agent_http.Url(text, tls=True), numbers.map("http://h:{}/".format), ValueError),
    plain("agent: status line", response, with_number(HEADS[0]), HttpError),
    plain("agent: chunk", response, with_number(HEADS[1]), HttpError),
    plain("agent: Retry-After", lambda text: agent_http.retry_after({"retry-after": text}, 60.0), numbers),
    plain("agent: request", request, st.text(max_size=300) | with_number("GET /5 HTTP/1.5\r\nHost: h:5\r\nOrigin: 5\r\n\r\n")),
    plain("agent: Consul's listing", lambda text: kv.entries(text.encode("utf-8", "replace"), "a/"), with_token(CONSUL)),
    plain("agent: election", lambda text: election.checked(parsing.loads(text)), with_token({"state": "told", "episode": "e", "ids": [], "at": 1}), ValueError),
    plain("agent: error of the API", lambda text: reporter.reason_of(text.encode("utf-8", "replace")), with_token({"error": {"message": "m", "code": "c"}})),
    plain("agent: repairs kept", restored, with_token(KEPT), *LAX, OverflowError),
    plain("agent: MQTT", lambda text: mqtt5.connack(text.encode("utf-8", "replace"), closed=True), st.text(max_size=30), HttpError),
    file("agent: state", "state.json", lambda path: agent_state.load(str(path.parent), "a"), with_token({"state": {"device_id": "a"}, "crc32": 1})),
    file("configuration", "nomad-watchdog.hcl", load.load, with_number(HCL), UserError),
    plain("environment", lambda text: load.load(None, {"NOMAD_WATCHDOG_SHARDS": text.replace("\0", ""), "NOMAD_WATCHDOG_RESYNC": text}), numbers, UserError),
    file("inventory, HCL", "a.hcl", lambda path: inventory_file.read(path, inventory_file.signature(path)), with_number(DEVICES), UserError),
    file("inventory, lines", "a.json", lambda path: inventory_file.read(path, inventory_file.signature(path)), with_token(DEVICE), UserError),
    file("inventory, list", "b.json", lambda path: inventory_file.read(path, inventory_file.signature(path)), with_token([DEVICE]), UserError),
    plain("duration", parse_duration, numbers.map("{}s".format), ValueError),
    plain("size", parse_size, numbers.map("{}Mi".format), ValueError),
    plain("listen", checked_listen, numbers.map("h:{}".format), ValueError),
    plain("device address", device_address.device_address, numbers, UserError),
    plain("endpoint", device_address.endpoint, numbers.map("h:{}".format), UserError),
    plain("address of a server", hashicorp_environment.checked_address, numbers.map("http://h:{}".format), ValueError),
    plain("API: report", body_of(schemas.ReportIn), with_token(REPORT), RequestError),
    plain("API: device", body_of(device_fields.DeviceIn), with_token(BODY), RequestError),
    plain("API: bulk", body_of(schemas.BulkIn), with_token({"devices": [DEVICE], "delete": ["b"]}), RequestError),
    plain("API: pause", body_of(schemas.PauseIn), with_token({"reason": "r", "for": "1m", "class": "c"}), RequestError),
    plain("API: events", body_of(schemas.EventsIn), with_token({"events": [EVENT]}), RequestError),
    plain("event of a replica", lambda text: merged_log.event_of(parsing.loads(text)), with_token(EVENT), ValueError),
    plain("credential", agent_token.claimed, numbers.map("wda1.a.{}.x".format)),
    plain("webhook", lambda text: webhook_signature.verify([b"k"], ("id", text, "v1,x"), b"", 0.0), numbers, webhook_signature.SignatureError),
    plain("record", lambda text: codec.decode(text.encode("utf-8", "replace")), with_token({"v": 1, "epoch": 1}), codec.PoisonError),
    plain("registry document", lambda text: epoch_floor.FORMAT.decode(text.encode("utf-8", "replace")), with_token({"v": 1, "epoch": 1, "generation": 1}), UserError),
    plain("pauses", lambda text: pauses.FORMAT.decode(text.encode("utf-8", "replace")), with_token(PAUSES), UserError),
    plain("migrations", lambda text: migration_state.FORMAT.decode(text.encode("utf-8", "replace")), with_token(MIGRATIONS), UserError),
    plain("rebalances", lambda text: rebalance_state.FORMAT.decode(text.encode("utf-8", "replace")), with_token(REBALANCES), UserError),
    plain("class set", lambda text: class_set.HEAD.decode(text.encode("utf-8", "replace")), with_token(CLASSES), UserError),
    plain("backup", lambda text: backup.parse(io.StringIO(text)), with_token(RECORD), UserError),
    file("plan file", "plan.json", plan._read, with_token({"v": 1, "actions": []}), UserError),
    plain("--since", status._since, numbers, UserError),
    plain("Consul's index", consul._index, numbers, TransientError),
    plain("Kubernetes' status", lambda text: _kubernetes_errors.translate(429, text.encode("utf-8", "replace"), "x", text), numbers | with_token({"code": 1, "reason": "r", "details": {"retryAfterSeconds": 1}})),
    plain("Kubernetes' placement", names.Ref.parse, numbers.map("a/pod/b#{}".format), UserError),
    plain("Kubernetes' labels", identity_with, numbers, UserError),
    plain("variable of a template", lambda text: objects._fill("${x}", {"x": text}, "timeoutSeconds"), numbers, UserError),
    plain("pods of a budget", lambda text: _budgets._pods_of({"metadata": {"annotations": {_budgets._PODS: text}}}), numbers),
    plain("namespaces in use", lambda text: namespaces._stored({"metadata": {}, "data": {"namespaces": text}}), numbers),
    plain("version of Nomad", lambda text: nomad_features.versions([text]), numbers.map("1.{}".format)),
    plain("caller of sudo", sudo_of, numbers),
    plain("replicas in Consul", lambda text: LeaseKeys("p").view([KvRow("p/leadership/replicas/r", text.encode("utf-8", "replace"), 1, "s")]), with_token({"api": "a", "since": 1.0, "shards": 1})),
    plain("shards in Consul", lambda text: LeaseKeys("p").view([KvRow(f"p/leadership/shards/{text}", b"{}", 1, "s")]), numbers),
    plain("cursor", pagination._uncursor, tokens, UserError),
    plain("labels", lambda text: parse_labels([text]), tokens.map("a={}".format), UserError),
    plain("quantity", _kubernetes_objects.number, numbers.map("{}Mi".format), ValueError),
    plain("Prometheus' answer", lambda text: prometheus.sample(parsing.loads(text)), with_token(PROMETHEUS), ValueError),
    plain("Consul's refusal", lambda text: consul._txn_refusal("x", text, ""), with_token({"Errors": [{"OpIndex": 0, "What": "x"}]})),
    plain("credential plugin", lambda text: _kubernetes_credentials._parse(text.encode("utf-8", "replace"), "p"), with_token(PLUGIN), UserError),
    plain("roll-out", lambda text: rollout.document_format("c").decode(text.encode("utf-8", "replace")), with_token({"v": 1, "good": None})),
    plain("event's data", lambda text: event_sql._event((1, 1.0, "k", "d", "s", "t", text, "o", "i", 1)), with_token({"a": 1})),
    plain("command of a class", lambda text: _placement.command_of(spec_with(text)), with_token(["a"]), UserError),
    file("placement", "placement.json", lambda path: files.read_entry(path.parent), with_token(ENTRY), files.CorruptError),
    file("placement's document", "config.json", lambda path: files.read_api(path.parent), with_token({"api": ["a"]})),
    file("lease", "lease.json", lambda path: lease_file(path).all(), with_token({"v": 1, "replica": "r", "api": "a", "since": 1.0, "term": 1})),
    file("worker", "worker.json", lambda path: local._read(path, local._Worker), with_token({"pid": 1}), TerminalError),
]  # fmt: skip


SOUND: dict[str, str] = {
    "agent: document": json.dumps(AGENT),
    "agent: repairs kept": json.dumps(KEPT),
    "configuration": HCL,
    "inventory, HCL": DEVICES,
    "inventory, lines": json.dumps(DEVICE),
    "inventory, list": json.dumps([DEVICE]),
    "API: report": json.dumps(REPORT),
    "API: device": json.dumps(BODY),
    "API: bulk": json.dumps({"devices": [DEVICE], "delete": ["b"]}),
    "API: pause": json.dumps({"reason": "r", "for": "1m", "class": "c"}),
    "API: events": json.dumps({"events": [EVENT]}),
    "event of a replica": json.dumps(EVENT),
    "Prometheus' answer": json.dumps(PROMETHEUS),
    "agent: status line": HEADS[0].replace("1.1 5", "1.1 200"),
    "agent: chunk": HEADS[1],
}


@pytest.mark.parametrize("name", SOUND)
def test_the_documents_that_are_mangled_are_themselves_taken(name: str, tmp_path: Path) -> None:
    """Each document is valid itself, so that a token in it gets as far as possible."""
    (parser,) = (one for one in PARSERS if one.name == name)
    parser.make(tmp_path)(SOUND[name])


@pytest.mark.parametrize("name", [name for name, text in SOUND.items() if text[:1] in "[{"])
def test_every_value_may_be_of_any_type(name: str, tmp_path: Path) -> None:
    """Each place of each document may hold a value of every type, and a number that is too large."""
    (parser,) = (one for one in PARSERS if one.name == name)
    parse, document = parser.make(tmp_path), json.loads(SOUND[name])
    for path in places(document):
        for token in ("{}", "[]", '{"a": {}}', "null", "true", "1e999"):
            with contextlib.suppress(*parser.errors):
                parse(mangled(document, path, token))


def fuzz(parser: Parser, folder: Path, examples: int) -> None:
    parse = parser.make(folder)

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(parser.inputs)
    def each(text: str) -> None:
        with contextlib.suppress(*parser.errors):
            parse(text)

    each()


@pytest.mark.parametrize("parser", PARSERS, ids=lambda one: one.name)
def test_each_hostile_token_alone(parser: Parser, tmp_path: Path) -> None:
    """Each token, not a random selection: nesting that Python's own parser answers with RecursionError was found only
    by the long run."""
    parse = parser.make(tmp_path)
    for token in [*TOKENS, '{"a":' * 5000]:
        with contextlib.suppress(*parser.errors):
            parse(token)


@pytest.mark.parametrize("parser", PARSERS, ids=lambda one: one.name)
def test_h6_what_comes_from_outside_is_a_value_or_an_error(parser: Parser, tmp_path: Path) -> None:
    """No number, text or nesting makes a parser raise an exception that its caller does not expect."""
    fuzz(parser, tmp_path, 25)


@pytest.mark.long
@pytest.mark.lasts(15.0)
@pytest.mark.parametrize("parser", PARSERS, ids=lambda one: one.name)
def test_h6_the_same_for_longer(parser: Parser, tmp_path: Path) -> None:
    """Like the test above, with two thousand inputs per parser; FUZZ_EXAMPLES sets another number."""
    fuzz(parser, tmp_path, int(os.environ.get("FUZZ_EXAMPLES", "2000")))

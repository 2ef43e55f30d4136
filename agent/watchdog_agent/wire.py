"""The contract between the agent and the control plane. Standard library only; both sides import it.

One JSON document configures an agent. It is a file named by ``WATCHDOG_CONFIG``, or
base64-encoded in ``WATCHDOG_CONFIG_B64``; under Nomad the file is the dispatch payload. These
environment variables take precedence over the document, for values that only a scheduler knows:

======================  ====================================================================
``WATCHDOG_INSTANCE``   ID of this run (else ``NOMAD_ALLOC_ID``, ``POD_UID``, else random)
``WATCHDOG_LISTEN``     ``host:port`` to listen on (else ``NOMAD_IP_http``/``NOMAD_PORT_http``, else
                        ``127.0.0.1:0``)
``WATCHDOG_STATE_DIR``  directory for stored state (else ``NOMAD_ALLOC_DIR``/data, else none)
``WATCHDOG_TOKEN_FILE`` file with the bearer token for the API, for a document without a credential
``WATCHDOG_CA_CERT``    file with the CAs that the API's certificate is verified with
``WATCHDOG_LOKI_URL``   URL to ship log lines to, as ``loki`` in the document
``CONSUL_HTTP_ADDR``    the local Consul agent; ``CONSUL_HTTP_TOKEN``/``_FILE``: its token;
                        ``CONSUL_HTTP_SSL`` = true: use https, whatever scheme the address has
``CONSUL_CACERT``       for https: path of the trusted CAs; ``CONSUL_CLIENT_CERT`` and
                        ``CONSUL_CLIENT_KEY``: paths of the client certificate and its key
======================  ====================================================================

Configuration document (version 1)::

    {"v": 1, "device_id": "...", "slug": "...", "epoch": 3, "agent_class": "default",
     "version": "0.1.0", "spec_hash": "...", "address": "127.1.0.4", "labels": {},
     "api": ["http://127.0.0.1:9670"], "ca_cert": "PEM or path; for https://", "credential": "...",
     "consul": "http://127.0.0.1:8500" | "",
     "consul_tls": {"ca_cert": "PEM or path", "client_cert": "path", "client_key": "path"}, (optional)
     "service": "device-watchdog-agent", "beat_s": 15.0,
     "probes": [{"kind": "tcp|http|icmp", "port": 8080, "path": "/", "expect_status": 200,
                 "interval_s": 5.0, "timeout_s": 2.0, "misses": 3}],
     "confirm": [{...a probe of another kind...}],
     "repairs": [{"kind": "interface|http|mqtt|unit|command|wake|plugin", "interface": "eth1",
                  "budget": 3, "window_s": 3600.0, "cooldown_s": 30.0, "timeout_s": 10.0,
                  "verify_s": 30.0, "when": "suspect|degraded|offline", "probe": "icmp", "tries": 1,
                  "dry_run": false, "even_behind_gateway": false}],
     "repair_policy": {"dry_run": false, "accepted_beats": 4, "alone_s": 86400.0},
     "escalate": {"sinks": [{"kind": "webhook", "url": "http://127.0.0.1:8080/hook"}]},
     "gateway": {"address": "10.0.0.1", ...a probe...}}      (optional)

The other probe kinds and their keys are documented in ``agent/README.md``. The label ``gateway`` of a device, if it
is an IP address, takes precedence over the address in ``gateway``. Addresses follow the rule of `address`.

Keys that only some documents have; an agent ignores those it does not know::

    {"escalate": {"sinks": [{"kind": "webhook|alertmanager|consul_event", "url": "...",
                             "token_file": "path", "name": "of the event"}], "degraded": false,
                  "by": ["gateway", "site", "class", "host"], "window_s": 30.0, "gather_s": 2.0,
                  "retry_s": 1.0, "give_up_s": 900.0, "consul_wait_s": 10.0, "session_ttl_s": 10.0,
                  "note_s": 900.0},
     "loki": {"url": "...", "token_file": "path", "tenant": "..."},
     "state": "consul", "prefix": "nomad-watchdog"}

`prefix` is the prefix of the keys in Consul's KV store.

The credential is the bearer token of this agent alone, valid only for reports of this device and epoch. It
is a secret: only the agent reads the document, and no page, log or report of the agent contains it.

Report, ``POST {api}/v1/agents/report`` (version 1): the fields of `report`. Answers: 200 accepted, with
``{"api": [...]}`` if there are several replicas: their addresses, for use when this one does not answer, and with
``{"condition": {"state": "offline|degraded", "age_s": 123.4, "reason": "...", "misses": 3}}`` if the device has
a condition that began before this agent: the agent adopts it until one of its own probes has succeeded;
and with ``{"pressure": true}`` to the few agents per host that are to read the pressure of their host: such an agent adds
``pressure`` to each following report, until an answer comes without it;
410 this agent is not, or no longer, accepted: stop and exit 0; with the error code ``departed`` the
device itself has left: resolve its alerts first; 409 not decided yet: send the report again after
``Retry-After`` seconds; 429 and 5xx: retry later. Any other answer is a bug of this agent and is logged.

For a class with repairs, a report contains ``"repairs": {"active": "the current repair, or empty", "exhausted":
false, "dry_run": false, "attempts": [{"number": 1, "step": "interface eth1", "outcome": "running|verifying|recovered|
no help|unable|failed|interrupted|dry run", "reason": "...", "age_s": 3.2}]}``, and its ``state`` is ``repairing``
while a step runs or its effect is being verified.

`pressure` is ``{"cpu": {"avg10": 1.5, "avg60": 0.8}, "memory": {...}, "io": {...}, "unreadable": "reason"}``: the share
of time, 0 to 100 percent, in which at least one task of the host waited for the resource, from the line ``some`` in
``/proc/pressure``. A resource that cannot be read is missing, and ``unreadable`` states why.

Exit codes: 0 only after a 410; 128+n on signal n; 64 for an invalid configuration;
70 for a crash.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    # Only for type checkers: at run time it would need 0.7 MB per device.
    from collections.abc import Mapping
    from typing import Final, NotRequired, TypedDict

    class _Config(TypedDict):
        device_id: str
        epoch: int
        agent_class: NotRequired[str]
        version: NotRequired[str]

    class RepairReport(TypedDict):
        """The current repair of the device, and the last attempts."""

        active: str
        exhausted: bool
        dry_run: bool
        attempts: list[dict[str, object]]

    class Stall(TypedDict):
        """Share of the last 10 and 60 seconds in which a task waited for a resource, percent."""

        avg10: float
        avg60: float

    class HostPressure(TypedDict, total=False):
        """The pressure of the agent's host. A resource that cannot be read is missing."""

        cpu: Stall
        memory: Stall
        io: Stall
        unreadable: str

    class Report(TypedDict):
        """One report."""

        v: int
        device_id: str
        epoch: int
        instance: str
        sequence: int
        agent_class: str
        version: str
        ready: bool
        state: str
        state_age_s: float
        was_ready: bool
        misses: int
        confirmed: bool
        reason: str
        listen: str
        dropped: int
        stopping: bool
        gateway: NotRequired[str]
        gateway_dead: NotRequired[bool]
        repairs: NotRequired[RepairReport]
        pressure: NotRequired[HostPressure]


VERSION: Final = 1
REPORT_PATH: Final = "/v1/agents/report"
SERVICE: Final = "device-watchdog-agent"
STATES: Final = ("ok", "suspect", "degraded", "repairing", "offline", "unable")
DEPARTED: Final = "departed"
"""Error code of a 410 for a device that has left the registry: its alerts are resolved."""
LOG_SIGNALLED: Final = "signal"
LOG_RETIRED: Final = "retired by the control plane"
"""The messages in an agent's log with which each graceful shutdown begins: one for a signal, one for an answer of 410."""

EXIT_RETIRED: Final = 0
EXIT_CONFIG: Final = 64
EXIT_CRASH: Final = 70


def agent_config(
    class_part: Mapping[str, object],
    *,
    device_id: str,
    slug: str,
    epoch: int,
    address: str,
    labels: dict[str, str],
) -> dict[str, object]:
    """The configuration document of one agent: the class's settings, overridden by the device's."""
    return {
        **class_part,
        "v": VERSION,
        "device_id": device_id,
        "slug": slug,
        "epoch": epoch,
        "address": address,
        "labels": labels,
    }


def report(  # noqa: PLR0913  # the report is flat on the wire; keyword-only arguments keep it readable
    config: _Config,
    *,
    instance: str,
    sequence: int,
    ready: bool,
    state: str,
    was_ready: bool,
    misses: int,
    confirmed: bool,
    reason: str,
    listen: str,
    dropped: int,
    state_age_s: float = 0.0,
    stopping: bool = False,
    gateway: str = "",
    gateway_dead: bool = False,
    repairs: RepairReport | None = None,
) -> Report:
    """Build one report. `sequence` increases by one per report of an instance; `dropped` counts reports
    lost because the buffer was full; `state_age_s`: seconds since the state began, by the agent's monotonic
    clock, including restarts and a predecessor's time if the state was taken over; `stopping` is true
    in the last report before an exit; `gateway` is the address of the device's gateway, and `gateway_dead` is true
    if it did not answer; both are set only if there is a gateway. `repairs` is present only for a class with repairs:
    the current repair, and the last attempts."""
    made: Report = {
        "v": VERSION,
        "device_id": config["device_id"],
        "epoch": config["epoch"],
        "instance": instance,
        "sequence": sequence,
        "agent_class": config.get("agent_class", ""),
        "version": config.get("version", ""),
        "ready": ready,
        "state": state,
        "state_age_s": round(state_age_s, 3),
        "was_ready": was_ready,
        "misses": misses,
        "confirmed": confirmed,
        "reason": reason,
        "listen": listen,
        "dropped": dropped,
        "stopping": stopping,
    }
    if gateway:
        made["gateway"], made["gateway_dead"] = gateway, gateway_dead
    if repairs is not None:
        made["repairs"] = repairs
    return made

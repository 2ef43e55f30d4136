"""The contract between the agent and the control plane. Standard library only; both sides import it.

One JSON document configures an agent. It comes as a file named by ``WATCHDOG_CONFIG``, or
base64-encoded in ``WATCHDOG_CONFIG_B64``; under Nomad the file is the dispatch payload. These
environment variables take precedence over the document, for values that only a scheduler knows:

======================  ====================================================================
``WATCHDOG_INSTANCE``   id of this run (else ``NOMAD_ALLOC_ID``, ``POD_UID``, else random)
``WATCHDOG_LISTEN``     ``host:port`` to serve on (else ``NOMAD_IP_http``/``NOMAD_PORT_http``, else
                        ``127.0.0.1:0``)
``WATCHDOG_STATE_DIR``  where state is kept (else ``NOMAD_ALLOC_DIR``/data, else none)
``WATCHDOG_TOKEN_FILE`` file with the bearer token for the API, for a document without a credential
``WATCHDOG_CA_CERT``    file with the authorities that the API's certificate is verified with
``WATCHDOG_LOKI_URL``   ship log lines there, as ``loki`` in the document
``CONSUL_HTTP_ADDR``    the local Consul agent; ``CONSUL_HTTP_TOKEN``/``_FILE`` its token,
                        ``CONSUL_HTTP_SSL`` = true: over https, whatever scheme it names
``CONSUL_CACERT``       over https: the authorities that are trusted; ``CONSUL_CLIENT_CERT`` and
                        ``CONSUL_CLIENT_KEY`` what is shown; paths
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

The other kinds of probe and their keys stand in ``agent/README.md``. The label ``gateway`` of a device, if it is
an IP address, takes precedence over the address in ``gateway``. Addresses follow the rule of `address`.

Keys that only some documents have; an agent that does not know one leaves it alone::

    {"escalate": {"sinks": [{"kind": "webhook|alertmanager|consul_event", "url": "...",
                             "token_file": "path", "name": "of the event"}], "degraded": false,
                  "by": ["gateway", "site", "class", "host"], "window_s": 30.0, "gather_s": 2.0,
                  "retry_s": 1.0, "give_up_s": 900.0, "consul_wait_s": 10.0, "session_ttl_s": 10.0,
                  "note_s": 900.0},
     "loki": {"url": "...", "token_file": "path", "tenant": "..."},
     "state": "consul", "prefix": "nomad-watchdog"}

`prefix` begins the keys in Consul's KV store.

The credential is the bearer token of this one agent: good for reports of this device and epoch only. It
is a secret: the document is read by nobody else, and no page, log or report of the agent shows it.

Report, ``POST {api}/v1/agents/report`` (version 1): the fields of `report`. Answers: 200 accepted, with
``{"api": [...]}`` where there are several replicas: their addresses, for when this one does not answer, and with
``{"condition": {"state": "offline|degraded", "age_s": 123.4, "reason": "...", "misses": 3}}`` where the device has
one that began before this agent: the agent believes it until a probe of its own has succeeded;
410 not, or no longer, the accepted agent: stop and exit 0, and when the error's code is ``departed`` the
device itself has left: end its alerts before; 409 not decidable yet: send it again after
``Retry-After`` seconds; 429 and 5xx: later. Anything else is this agent's bug and is logged.

Of a class with repairs a report holds ``"repairs": {"active": "what is done now, or empty", "exhausted":
false, "dry_run": false, "attempts": [{"number": 1, "step": "interface eth1", "outcome": "running|verifying|recovered|
no help|unable|failed|interrupted|dry run", "reason": "...", "age_s": 3.2}]}``, and while a step is taken or its
effect is awaited its ``state`` is ``repairing``.

Exit contract: 0 only after a 410; 128+n on signal n; 64 for a bad configuration;
70 for a crash.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    # only checkers read it: at run time it would cost each device 0.7 MB
    from collections.abc import Mapping
    from typing import Final, NotRequired, TypedDict

    class _Config(TypedDict):
        device_id: str
        epoch: int
        agent_class: NotRequired[str]
        version: NotRequired[str]

    class RepairReport(TypedDict):
        """What is done about the device now, and the last attempts."""

        active: str
        exhausted: bool
        dry_run: bool
        attempts: list[dict[str, object]]

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


VERSION: Final = 1
REPORT_PATH: Final = "/v1/agents/report"
SERVICE: Final = "device-watchdog-agent"
STATES: Final = ("ok", "suspect", "degraded", "repairing", "offline", "unable")
DEPARTED: Final = "departed"
"""The code of a 410 for a device that has left the registry: its alerts end."""
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
    """The configuration document of one agent: the class's part with the device's laid over it."""
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
    """One report. `sequence` goes up by one for each report of an instance; `dropped` counts reports
    that were lost to the bounded buffer; `state_age_s`: seconds since the state began, by the agent's
    monotonic clock, over its restarts and over its predecessor's time where it has taken that over;
    `stopping` is true in the last one before an exit; `gateway` is the address of what stands before the
    device, `gateway_dead` that it did not answer: both only where there is one. `repairs` is there only for
    a class with repairs: what is done now, and the last attempts."""
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

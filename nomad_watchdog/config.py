"""Every setting: one HCL file, checked whole at the door, converted once (seconds, bytes).

A value comes from the first of: command-line flag, environment, file, default. The file is the first
of: ``--config``, ``NOMAD_WATCHDOG_CONFIG``, ``./nomad-watchdog.hcl`` if there is one. What each
setting is for stands in docs/configuration.md; a test keeps the two equal.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from nomad_watchdog import __version__
from nomad_watchdog.config_hcl import parse_duration, parse_size, show
from nomad_watchdog.errors import UserError
from nomad_watchdog.model import AgentSpec, Limits

FILE_NAME: Final = "nomad-watchdog.hcl"
PREFIX: Final = "NOMAD_WATCHDOG_"
ENVIRONMENT: Final[Mapping[str, tuple[str, str]]] = {
    "NOMAD_ADDR": ("nomad", "address"),
    "NOMAD_NAMESPACE": ("nomad", "namespace"),
    "NOMAD_REGION": ("nomad", "region"),
    "NOMAD_TOKEN_FILE": ("nomad", "token_file"),
    "NOMAD_CACERT": ("nomad", "ca_cert"),
    "NOMAD_CLIENT_CERT": ("nomad", "client_cert"),
    "NOMAD_CLIENT_KEY": ("nomad", "client_key"),
    "NOMAD_SKIP_VERIFY": ("nomad", "tls_skip_verify"),
    "CONSUL_HTTP_ADDR": ("consul", "address"),
    "CONSUL_HTTP_TOKEN_FILE": ("consul", "token_file"),
    "CONSUL_CACERT": ("consul", "ca_cert"),
    "CONSUL_CLIENT_CERT": ("consul", "client_cert"),
    "CONSUL_CLIENT_KEY": ("consul", "client_key"),
}
"""HashiCorp's own variables; ours (NOMAD_WATCHDOG_<BLOCK>_<SETTING>) go over them."""


def _url(value: str) -> str:
    parts = urlsplit(value if "//" in value else f"http://{value}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{show(value)} is not an address; write http://HOST:PORT or https://...")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("an address holds no user, password, query or fragment")
    _ = parts.port  # raises ValueError when it is no port
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def _url_or_none(value: str) -> str:
    return _url(value) if value else ""


def _listen(value: str) -> str:
    host, separator, port = value.rpartition(":")
    if not separator or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{show(value)} is not HOST:PORT")
    return f"{host or '0.0.0.0'}:{port}"  # noqa: S104  # ":9670" means every address, as in Go


Seconds = Annotated[float, BeforeValidator(parse_duration), Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, BeforeValidator(parse_duration), Field(gt=0, allow_inf_nan=False)]
Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Url = Annotated[str, AfterValidator(_url)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,31}$")]
Text = Annotated[str, Field(max_length=1024)]


class Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False)


class Api(Block):
    listen: Annotated[str, AfterValidator(_listen)] = "127.0.0.1:9670"
    advertise: Url | None = None
    token_file: Text | None = None
    max_body: Size = 1024 * 1024


class Nomad(Block):
    address: Url = "http://127.0.0.1:4646"
    namespace: Text = "default"
    region: Text | None = None
    token_file: Text | None = None
    ca_cert: Text | None = None
    client_cert: Text | None = None
    client_key: Text | None = None
    tls_skip_verify: bool = False
    strategy: Literal["dispatch", "register"] = "dispatch"
    job_prefix: Name = "device-watchdog"


class Consul(Block):
    address: Url = "http://127.0.0.1:8500"
    token_file: Text | None = None
    ca_cert: Text | None = None
    client_cert: Text | None = None
    client_key: Text | None = None
    prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9._-]+)*$")] = (
        "nomad-watchdog"
    )
    service: Name = "device-watchdog-agent"
    agent_address: Annotated[str, AfterValidator(_url_or_none)] | None = None


class Local(Block):
    directory: Text | None = None
    python: Text | None = None


class Registry(Block):
    kind: Literal["sqlite", "consul"] | None = None
    path: Text | None = None


class Probe(Block):
    kind: Literal["tcp", "http", "icmp"]
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    path: Annotated[str, Field(pattern=r"^/[!-~]*$")] | None = None
    expect_status: Annotated[int, Field(ge=100, le=599)] | None = None
    interval: Positive = 5.0
    timeout: Positive = 2.0
    misses: Annotated[int, Field(ge=1, le=100)] = 3

    @model_validator(mode="after")
    def _fits(self) -> Probe:
        if self.timeout >= self.interval:
            raise ValueError(
                f"timeout ({self.timeout:g}s) must be shorter than interval ({self.interval:g}s)"
            )
        if (self.kind == "icmp") != (self.port is None):
            raise ValueError(
                "icmp knows no port" if self.kind == "icmp" else f"{self.kind} needs a port"
            )
        if self.kind != "http" and (self.path is not None or self.expect_status is not None):
            raise ValueError(f"{self.kind} knows no path and no expect_status; http does")
        return self

    def wire(self) -> dict[str, Any]:
        """As watchdog_agent.wire says it."""
        out: dict[str, Any] = {"kind": self.kind}
        if self.port is not None:
            out["port"] = self.port
        if self.kind == "http":
            out |= {"path": self.path or "/", "expect_status": self.expect_status or 200}
        return out | {
            "interval_s": self.interval,
            "timeout_s": self.timeout,
            "misses": self.misses,
        }


REPAIRS: Final[Mapping[str, str]] = {
    "interface": "interface",
    "http": "url",
    "unit": "unit",
    "command": "command",
    "wake": "mac",
}
"""Kind of repair → the one setting that says on what it is done."""


class Repair(Block):
    """One step of a class's ladder, in the order of the file."""

    kind: Literal["interface", "http", "unit", "command", "wake"]
    interface: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,14}$")] | None = None
    url: Url | None = None
    unit: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9:_.@-]{0,254}$")] | None = None
    command: Annotated[tuple[Text, ...], Field(min_length=1, max_length=64)] | None = None
    mac: Annotated[str, Field(pattern=r"^[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}$")] | None = None
    budget: Annotated[int, Field(ge=1, le=1000)] = 3
    window: Positive = 3600.0
    cooldown: Seconds = 30.0
    timeout: Positive = 10.0

    @model_validator(mode="after")
    def _fits(self) -> Repair:
        wanted = REPAIRS[self.kind]
        for setting in REPAIRS.values():
            if (getattr(self, setting) is not None) != (setting == wanted):
                raise ValueError(
                    f"{self.kind} needs {wanted}"
                    if setting == wanted
                    else f"{self.kind} knows no {setting}; it acts on {wanted}"
                )
        if self.timeout >= self.window:
            raise ValueError(
                f"timeout ({self.timeout:g}s) must be shorter than window ({self.window:g}s)"
            )
        return self

    def wire(self) -> dict[str, Any]:
        """As the agent's document says it, under `repairs`."""
        return {
            "kind": self.kind,
            REPAIRS[self.kind]: getattr(self, REPAIRS[self.kind]),
            "budget": self.budget,
            "window_s": self.window,
            "cooldown_s": self.cooldown,
            "timeout_s": self.timeout,
        }


class AgentClass(Block):
    template: Text = ""
    version: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$")] = __version__
    driver: Name | None = None
    cpu: Annotated[int, Field(ge=1, le=1_000_000)] = 50
    memory: Size = 64 * 1024 * 1024
    kill_timeout: Positive = 10.0
    variables: dict[str, Text] = Field(default_factory=dict)
    metadata: dict[str, Text] = Field(default_factory=dict)
    beat: Positive = 15.0
    probe: tuple[Probe, ...] = ()
    confirm: tuple[Probe, ...] = ()
    repair: tuple[Repair, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> AgentClass:
        same = {probe.kind for probe in self.probe} & {probe.kind for probe in self.confirm}
        if same:
            raise ValueError(f"confirm must be of another kind than probe; both have {min(same)}")
        if self.driver and "driver" in self.variables:
            raise ValueError("driver is given twice: as a setting and in variables")
        return self


class Presence(Block):
    startup_grace: Positive = 60.0
    report_stale: Positive = 45.0


class Retry(Block):
    initial: Positive = 1.0
    max: Positive = 300.0
    starts_per_hour: Annotated[int, Field(ge=1, le=3600)] = 20
    concurrency: Annotated[int, Field(ge=1, le=64)] = 16


class Breaker(Block):
    min: Annotated[int, Field(ge=0)] = 5
    fraction: Fraction = 0.10


class Rollout(Block):
    at_once: Annotated[int, Field(ge=1)] = 5
    fraction: Fraction = 0.10


class Log(Block):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "text"] = "json"


def _default_class() -> dict[str, AgentClass]:
    return {
        "default": AgentClass(probe=(Probe(kind="tcp", port=80),), confirm=(Probe(kind="icmp"),))
    }


class Settings(Block):
    """All settings, checked. Secrets aren't here, only the names of the files that hold them (S10)."""

    backend: str = "local"
    shards: Annotated[int, Field(ge=1, le=256)] = 1
    data_dir: Text = ""
    api: Api = Api()
    nomad: Nomad = Nomad()
    consul: Consul = Consul()
    local: Local = Local()
    registry: Registry = Registry()
    agent_class: dict[Name, AgentClass] = Field(default_factory=_default_class)
    presence: Presence = Presence()
    retry: Retry = Retry()
    breaker: Breaker = Breaker()
    rollout: Rollout = Rollout()
    resync: Annotated[Positive, Field(ge=1)] = 30.0
    log: Log = Log()

    @property
    def advertise(self) -> str:
        """What agents are told to report to."""
        return self.api.advertise or f"http://{self.api.listen}"

    @property
    def registry_kind(self) -> str:
        return self.registry.kind or ("sqlite" if self.backend == "local" else "consul")

    @property
    def registry_path(self) -> FilePath:
        return FilePath(self.registry.path or FilePath(self.data_dir) / "registry.db")

    @property
    def local_directory(self) -> FilePath:
        return FilePath(self.local.directory or FilePath(self.data_dir) / "agents")

    @property
    def agent_consul(self) -> str:
        """The Consul address that agents are told; "" = they register nowhere."""
        if self.consul.agent_address is not None:
            return self.consul.agent_address
        return "" if self.backend == "local" else self.consul.address

    def limits(self) -> Limits:
        return Limits(
            breaker_min=self.breaker.min,
            breaker_fraction=self.breaker.fraction,
            replace_at_once=self.rollout.at_once,
            replace_fraction=self.rollout.fraction,
            startup_grace_s=self.presence.startup_grace,
            report_stale_s=self.presence.report_stale,
            backoff_initial_s=self.retry.initial,
            backoff_max_s=self.retry.max,
            starts_per_hour=self.retry.starts_per_hour,
            concurrency=self.retry.concurrency,
            resync_s=self.resync,
        )

    def specs(self) -> dict[str, AgentSpec]:
        """One spec a class. Raises UserError when a template file can't be read."""
        return {name: self._spec(name, kind) for name, kind in self.agent_class.items()}

    def _spec(self, name: str, kind: AgentClass) -> AgentSpec:
        variables = kind.variables | ({"driver": kind.driver} if kind.driver else {})
        behaviour = {
            "template": template_text(kind.template),
            "version": kind.version,
            "resources": [kind.cpu, kind.memory, kind.kill_timeout],
            "probes": [probe.wire() for probe in kind.probe],
            "confirm": [probe.wire() for probe in kind.confirm],
            "beat_s": kind.beat,
            "variables": variables,
            "metadata": kind.metadata,
        }
        # Only when there are any, so that a class without keeps its hash, and its agents.
        repairs = {"repairs": [step.wire() for step in kind.repair]} if kind.repair else {}
        behaviour |= repairs
        digest = hashlib.sha256(_canonical(behaviour).encode()).hexdigest()[:12]
        return AgentSpec(
            agent_class=name,
            version=kind.version,
            spec_hash=digest,
            template=kind.template,
            cpu_mhz=kind.cpu,
            memory_bytes=kind.memory,
            kill_timeout_s=kind.kill_timeout,
            variables=self._places() | variables,
            agent_config=_canonical(
                {
                    "v": 1,
                    "agent_class": name,
                    "version": kind.version,
                    "spec_hash": digest,
                    "api": [self.advertise],
                    "consul": self.agent_consul,
                    "service": self.consul.service,
                    "beat_s": kind.beat,
                    "probes": behaviour["probes"],
                    "confirm": behaviour["confirm"],
                    "metadata": kind.metadata,
                }
                | repairs
            ),
        )

    def _places(self) -> dict[str, str]:
        """Where agents find themselves and their token: defaults for the template, not behaviour, so
        that a moved API rolls no agent."""
        if self.backend != "nomad":
            return {}
        token = {"token_file": self.api.token_file} if self.api.token_file else {}
        return {"agent_source": f"{self.advertise}/artifacts/watchdog-agent.pyz"} | token


def template_text(template: str) -> str:
    """The text of a template file, or the name of a built-in one. Raises UserError."""
    if "/" not in template and not template.endswith((".hcl", ".yaml")):
        return f"builtin:{template}"
    try:
        return FilePath(template).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"template file {show(template)}: {why}") from error


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)

"""All settings. They are checked together when loaded, and converted once (to seconds, bytes).

A value comes from the first of: command-line flag, environment, file, default. The file is the first of:
``--config``, ``NOMAD_WATCHDOG_CONFIG``, ``./nomad-watchdog.hcl`` if it exists. docs/configuration.md describes each
setting; a test keeps both consistent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Annotated, Final
from urllib.parse import urlsplit

from pydantic import Field

from nomad_watchdog import text_files
from nomad_watchdog.clients.hashicorp_environment import files_of
from nomad_watchdog.config.agent_classes import AgentClassSettings, BackendOverrides, default_class
from nomad_watchdog.config.api import ApiSettings
from nomad_watchdog.config.blocks import (
    AgentSettings,
    ConsulSettings,
    EventSettings,
    IncidentSettings,
    KubernetesSettings,
    LocalSettings,
    LogSettings,
    MassChangeSettings,
    NomadSettings,
    PresenceSettings,
    RegistrySettings,
    RetrySettings,
)
from nomad_watchdog.config.pools import PoolSettings
from nomad_watchdog.config.relief import ReliefSettings
from nomad_watchdog.config.rollouts import RolloutSettings
from nomad_watchdog.config.settings_text import flat
from nomad_watchdog.config.types import (
    Block,
    Inventories,
    Name,
    Positive,
    Text,
    certificates,
)
from nomad_watchdog.core.relief import ReliefRules
from nomad_watchdog.core.rollout_steps import Strategy
from nomad_watchdog.errors import UserError
from nomad_watchdog.model import AgentSpec, Limits, PresenceRules, Variant
from nomad_watchdog.schedulers import agent_zipapp
from nomad_watchdog.schedulers.agent_document import check_class, from_text, to_text, with_fields

FILE_NAME: Final = "nomad-watchdog.hcl"
PREFIX: Final = "NOMAD_WATCHDOG_"
BUILT_IN: Final = "builtin:"
"""Prefix of the name of a built-in template, in place of the text of a file."""
_REACHED: Final = ("api", "consul", "service", "prefix", "ca_cert", "consul_tls")
"""Keys of the agent's document that are not behaviour of its class."""


class Settings(Block):
    """All settings, validated. They contain no secrets, only the names of files with secrets (S10)."""

    backend: str = "local"
    shards: Annotated[int, Field(ge=1, le=256)] = 1
    data_dir: Text = ""
    api: ApiSettings = ApiSettings()
    nomad: NomadSettings = NomadSettings()
    kubernetes: KubernetesSettings = KubernetesSettings()
    consul: ConsulSettings = ConsulSettings()
    local: LocalSettings = LocalSettings()
    registry: RegistrySettings = RegistrySettings()
    agent_class: dict[Name, AgentClassSettings] = Field(default_factory=default_class)
    agent_pool: dict[Name, PoolSettings] = Field(default_factory=dict)
    agents: AgentSettings = AgentSettings()
    presence: PresenceSettings = PresenceSettings()
    retry: RetrySettings = RetrySettings()
    mass_change: MassChangeSettings = MassChangeSettings()
    rollout: RolloutSettings = RolloutSettings()
    relief: ReliefSettings | None = None
    incident: IncidentSettings = IncidentSettings()
    events: EventSettings = EventSettings()
    resync: Annotated[Positive, Field(ge=1)] = 30.0
    lease_ttl: Annotated[Positive, Field(ge=1, le=60)] = 3.0
    inventory: Inventories = ()
    log: LogSettings = LogSettings()
    _deprecated: tuple[str, ...] = ()

    def model_post_init(self, context: object, /) -> None:
        """`context`: the warnings of `config.renamed`, if there are any."""
        if isinstance(context, tuple):
            self._deprecated = context

    @property
    def deprecated(self) -> tuple[str, ...]:
        """A warning for each setting that was given under its old name."""
        return self._deprecated

    @property
    def advertise(self) -> str:
        """The URL that agents report to."""
        return self.api.advertise or f"{'https' if self.api.secure else 'http'}://{self.api.listen}"

    @property
    def own_address(self) -> str:
        """The URL of this replica alone."""
        return self.api.own_address or self.advertise

    @property
    def certified(self) -> str:
        """The host that the replicas' certificates name; "" = each replica's own host. Behind a shared address,
        certificates name that address, because they can't name a pod's own address."""
        return (urlsplit(self.advertise).hostname or "") if self.api.own_address else ""

    @property
    def registry_kind(self) -> str:
        return self.registry.kind or ("sqlite" if self.backend == "local" else "consul")

    @property
    def registry_path(self) -> FilePath:
        return FilePath(self.registry.path or FilePath(self.data_dir) / "registry.db")

    @property
    def events_path(self) -> FilePath:
        return FilePath(self.data_dir) / "events.db"

    @property
    def published_events_path(self) -> FilePath:
        return FilePath(self.data_dir) / "events-told.db"

    @property
    def audit_path(self) -> FilePath:
        return FilePath(self.data_dir) / "audit.db"

    @property
    def published_audit_path(self) -> FilePath:
        return FilePath(self.data_dir) / "audit-told.db"

    @property
    def local_directory(self) -> FilePath:
        return FilePath(self.local.directory or FilePath(self.data_dir) / "agents")

    @property
    def pools_directory(self) -> FilePath:
        return FilePath(self.data_dir) / "pools"

    @property
    def agent_consul(self) -> str:
        """The Consul address for agents; "" = they do not register in Consul."""
        if self.consul.agent_address is not None:
            return self.consul.agent_address
        return "" if self.backend == "local" else self.consul.address

    def limits(self) -> Limits:
        return Limits(
            breaker_min=self.mass_change.min,
            breaker_fraction=self.mass_change.fraction,
            replace_at_once=self.rollout.at_once,
            replace_fraction=self.rollout.fraction,
            soak_s=self.rollout.soak,
            soak_deaths=self.rollout.deaths,
            startup_grace_s=self.agents.startup_grace,
            startup_grace_min_s=self.agents.startup_grace_min,
            startup_grace_max_s=self.agents.startup_grace_max,
            report_stale_s=self.agents.report_stale,
            heartbeat_fresh_s=self.presence.heartbeat_fresh,
            suspect_max_s=max(
                [self.agents.suspect_max, *(one.suspect_s() for one in self.agent_class.values())]
            ),
            repairing_max_s=self.agents.repairing_max,
            start_max_s=self.agents.start_max,
            incident_min=self.incident.min,
            incident_fraction=self.incident.fraction,
            incident_window_s=self.incident.window,
            backoff_initial_s=self.retry.initial,
            backoff_max_s=self.retry.max,
            starts_per_hour=self.retry.starts_per_hour,
            concurrency=self.retry.concurrency,
            resync_s=self.resync,
            tombstone_ttl_s=self.presence.tombstone_ttl,
            leaves=self.nomad.leaves() | self.kubernetes.leaves(),
            presence=PresenceRules(
                ttl_s=self.presence.ttl or 0.0,
                class_ttl_s={
                    name: kind.ttl
                    for name, kind in self.agent_class.items()
                    if kind.ttl is not None
                },
                grace_s=self.presence.grace,
                flap_changes=self.presence.flap_changes,
                flap_half_life_s=self.presence.flap_half_life,
            ),
        )

    def strategies(self) -> dict[str, Strategy]:
        """How the versions of each class are rolled out."""
        return {
            name: (kind.rollout or self.rollout).strategy(
                own_version="version" not in kind.model_fields_set, soak_s=self.rollout.soak
            )
            for name, kind in self.agent_class.items()
        }

    def relief_rules(self) -> ReliefRules | None:
        """None = no host is relieved."""
        return self.relief.rules() if self.relief is not None else None

    def specs(self) -> dict[str, AgentSpec]:
        """One spec per class. Raises UserError if a template file can't be read."""
        return {name: self._spec(name, kind) for name, kind in self.agent_class.items()}

    def readable_specs(self) -> tuple[dict[str, AgentSpec], dict[str, str]]:
        """The spec of each class whose template can be read, and the errors of the others.

        Raises UserError for errors that concern all classes: in files with certificates."""
        self._agent_trust()
        specs: dict[str, AgentSpec] = {}
        unreadable: dict[str, str] = {}
        for name, kind in self.agent_class.items():
            try:
                specs[name] = self._spec(name, kind)
            except UserError as error:
                unreadable[name] = str(error)
        return specs, unreadable

    def _spec(self, name: str, kind: AgentClassSettings) -> AgentSpec:
        variables = kind.variables | ({"driver": kind.driver} if kind.driver else {})
        variables |= {"workload": kind.workload} if kind.workload else {}
        text = template_text(kind.template)
        behaviour = {
            "template": text,
            "version": kind.version,
            "resources": [kind.cpu, kind.memory, kind.kill_timeout],
            "probes": [probe.wire() for probe in kind.probe],
            "confirm": [probe.wire() for probe in kind.confirm],
            "beat_s": kind.beat,
            "variables": variables,
            "metadata": kind.metadata,
        }
        # Only if set, so that a class without them keeps its hash and its agents.
        repairs = kind.repairs_wire()
        gateway = {"gateway": kind.gateway.wire()} if kind.gateway else {}
        alerts = kind.alert_wire()
        behaviour |= repairs | gateway | alerts
        digest = hashlib.sha256(to_text(behaviour).encode()).hexdigest()[:12]
        spec = AgentSpec(
            agent_class=name,
            version=kind.version,
            spec_hash=digest,
            template=kind.template,
            text="" if text.startswith(BUILT_IN) else text,
            cpu_mhz=kind.cpu,
            memory_bytes=kind.memory,
            kill_timeout_s=kind.kill_timeout,
            variables=variables,
            on={backend: _variant(here) for backend, here in kind.on.items()},
            settings=_described(kind, behaviour["template"]),
            agent_config=from_text(
                to_text(
                    {
                        "v": 1,
                        "agent_class": name,
                        "version": kind.version,
                        "spec_hash": digest,
                        "beat_s": kind.beat,
                        "probes": behaviour["probes"],
                        "confirm": behaviour["confirm"],
                        "metadata": kind.metadata,
                    }
                    | repairs
                    | gateway
                    | alerts
                    | self._reached(prefix=bool(alerts))
                )
            ),
        )
        check_class(spec)
        return spec

    def _reached(self, *, prefix: bool) -> dict[str, object]:
        """Where agents report to, and which certificates they trust. Raises UserError.

        These keys are not behaviour of a class: they are in no hash, and each replica has its own. `prefix`: agents
        also store data in Consul."""
        return {
            "api": [self.advertise],
            "consul": self.agent_consul,
            "service": self.consul.service,
            **({"prefix": self.consul.prefix} if prefix else {}),
            **self._agent_trust(),
        }

    def placer(self) -> Callable[[AgentSpec], AgentSpec]:
        """Returns a function that sets this replica's own keys in the spec of another replica: where agents report
        to, and which certificates they trust. Raises UserError if a file with certificates can't be read."""
        own = self._reached(prefix=True)

        def place(spec: AgentSpec) -> AgentSpec:
            document = spec.agent_config
            keys = own.keys() if "prefix" in document else own.keys() - {"prefix"}
            kept = {name: value for name, value in document.items() if name not in _REACHED}
            return with_fields(replace(spec, agent_config=kept), **{key: own[key] for key in keys})

        return place

    def _agent_trust(self) -> dict[str, object]:
        """The certificates that agents trust over HTTPS, and their client certificate for Consul. Raises UserError."""
        api, consul = self.api, self.consul
        trust: dict[str, object] = {}
        if api.ca_cert:
            trust["ca_cert"] = certificates("api.ca_cert", api.ca_cert)
        if self.agent_consul.startswith("https://"):
            tls: dict[str, object] = {
                "ca_cert": self._authorities_of_consul(),
                "client_cert": consul.agent_client_cert,
                "client_key": consul.agent_client_key,
                "server_name": consul.tls_server_name,
            }
            given = {name: value for name, value in tls.items() if value}
            trust["consul_tls"] = given | ({"verify": False} if consul.tls_skip_verify else {})
        return trust

    def _authorities_of_consul(self) -> str:
        """The certificate authorities of Consul as PEM text; "" = those of the system. Raises UserError."""
        if self.consul.ca_cert:
            return certificates("consul.ca_cert", self.consul.ca_cert)
        if not self.consul.ca_path:
            return ""
        files = files_of("consul.ca_path", self.consul.ca_path)
        return "".join(certificates("consul.ca_path", str(file)) for file in files)

    def spec_on(self, backend: str, spec: AgentSpec) -> AgentSpec:
        """The spec for one backend: with the class's `on` block for it and, on Nomad, where agents find their program
        and token. Neither is behaviour: a new API address or backend rolls out no agents."""
        here = spec.on.get(backend, Variant(spec.template, spec.text, spec.variables))
        variables = here.variables
        if backend == "nomad":
            variables = {**self._places(variables, spec.agent_file), **variables}
        return replace(spec, template=here.template, text=here.text, variables=variables)

    def _places(self, given: Mapping[str, str], agent_file: str) -> dict[str, str]:
        token = {"token_file": file} if (file := self.api.agent_token_file) else {}
        if given.get("agent_source") or given.get("agent_path"):
            return token  # and a checksum of its own, or none
        # A version that was proven before an upgrade keeps its program, if it is still here.
        is_kept = (
            agent_file and agent_zipapp.published(FilePath(self.data_dir), agent_file).exists()
        )
        sha256 = agent_file if is_kept else agent_zipapp.checksum()
        return {
            "agent_source": f"{self.advertise}/artifacts/{sha256}/watchdog-agent.pyz",
            "agent_checksum": f"sha256:{sha256}",
            **token,
        }


def _variant(here: BackendOverrides) -> Variant:
    try:
        text = template_text(here.template)
    except UserError:
        text = ""  # it may be on another machine; an error is reported where it is used
    return Variant(here.template, "" if text.startswith(BUILT_IN) else text, here.filled())


def _described(kind: AgentClassSettings, template: object) -> dict[str, str]:
    """The settings in the hash of a class, as text; without those of a single backend."""
    found = {
        name: value
        for name, value in flat(kind, hide_text=True).items()
        if name != "ttl" and not name.startswith(("on.", "rollout"))
    }
    text = str(template)
    if not text.startswith(BUILT_IN):
        found["text of the template"] = f"#{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    return found


def template_text(template: str) -> str:
    """The text of a template file, or the name of a built-in one. Raises UserError."""
    if "/" not in template and not template.endswith((".hcl", ".yaml")):
        return f"{BUILT_IN}{template}"
    return text_files.read("template file", template)


def state_dir(env: Mapping[str, str]) -> str:
    """The default of `data_dir`, in the user's state directory. Raises UserError for a user without a home."""
    try:
        state = env.get("XDG_STATE_HOME") or f"{env.get('HOME') or FilePath.home()}/.local/state"
    except RuntimeError:  # a user without a passwd entry, as in a container
        why = "set data_dir (NOMAD_WATCHDOG_DATA_DIR): this user has no home folder"
        raise UserError(why) from None
    return str(FilePath(state) / "nomad-watchdog")

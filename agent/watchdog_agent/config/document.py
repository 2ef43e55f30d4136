"""Validation of the configuration document. Any error rejects the whole document."""

from __future__ import annotations

import os

from watchdog_agent import errors, wire
from watchdog_agent.config import probes, table, validators
from watchdog_agent.config.validators import check_list, check_url
from watchdog_agent.runtime import parsing
from watchdog_agent.runtime.http import reason_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from watchdog_agent.runtime.types import Config, Document, Probe


ConfigError = errors.ConfigError
CONSUL_TLS = (
    ("CONSUL_CACERT", "ca_cert"),
    ("CONSUL_CLIENT_CERT", "client_cert"),
    ("CONSUL_CLIENT_KEY", "client_key"),
    ("CONSUL_TLS_SERVER_NAME", "server_name"),
)


def load(environ: Mapping[str, str]) -> Config:
    """Load and check the document that the environment names. Raises ConfigError."""
    if environ.get("WATCHDOG_CONFIG_B64"):
        import base64

        try:
            raw = base64.b64decode(environ["WATCHDOG_CONFIG_B64"], validate=True)
        except ValueError as error:
            raise ConfigError(f"WATCHDOG_CONFIG_B64 is not base64: {error}") from None
    elif environ.get("WATCHDOG_CONFIG"):
        try:
            with open(environ["WATCHDOG_CONFIG"], "rb") as file:
                raw = file.read(1 << 20)
        except OSError as error:
            raise ConfigError(f"WATCHDOG_CONFIG: {reason_of(error)}") from None
    else:
        raise ConfigError("set WATCHDOG_CONFIG (a file) or WATCHDOG_CONFIG_B64")
    try:
        config = parsing.loads(raw)
    except ValueError as error:
        raise ConfigError(f"the configuration is not JSON: {error}") from None
    if isinstance(config, dict):
        _of_consul(config, environ)
    if isinstance(config, dict) and environ.get("WATCHDOG_LOKI_URL"):
        config["loki"] = {"url": environ["WATCHDOG_LOKI_URL"]}
    return check(config)


def _of_consul(config: Document, environ: Mapping[str, str]) -> None:
    """Apply the environment's Consul settings, which override the document, by the rules of Consul's own CLI. Raises
    ConfigError."""
    place = environ.get("CONSUL_HTTP_ADDR") or config.get("consul")
    if isinstance(place, str) and place:
        place = place if ":/" in place else f"http://{place}"
        if _flag(environ, "CONSUL_HTTP_SSL", False) and place.startswith("http://"):
            place = f"https://{place[7:]}"
        config["consul"] = place
    found: Document = {
        name: environ[variable] for variable, name in CONSUL_TLS if environ.get(variable)
    }
    if not _flag(environ, "CONSUL_HTTP_SSL_VERIFY", True):
        found["verify"] = False
    known = config.get("consul_tls", {})
    if found and isinstance(known, dict):  # else `check` rejects it
        config["consul_tls"] = known | found


def _flag(environ: Mapping[str, str], variable: str, usual: bool) -> bool:
    """Parse a boolean as Go does. Raises ConfigError."""
    text = environ.get(variable) or str(usual)
    if text in ("1", "t", "T", "TRUE", "true", "True"):
        return True
    if text in ("0", "f", "F", "FALSE", "false", "False"):
        return False
    raise ConfigError(f"{variable} is {text!r}; write true or false")


def check(config: object) -> Config:
    """Check the document and fill in defaults. Raises ConfigError."""
    if not isinstance(config, dict):
        raise ConfigError("the configuration must be an object")
    if config.get("v") != wire.VERSION:
        raise ConfigError(f"v is {config.get('v')!r}; this agent knows {wire.VERSION}")
    _check_identity(config)
    for url in check_list(config, "api"):
        check_url(url, "http:// or https:// address", tls=True)
    if config.get("consul"):
        check_url(config["consul"], "http:// or https:// address", tls=True)
    _check_consul_tls(config)
    validators.fill(config, table.AgentTable)
    config["probes"] = [probes.check(p, "probes") for p in check_list(config, "probes")]
    config["confirm"] = [probes.check(p, "confirm") for p in check_list(config, "confirm")]
    if not config["probes"]:
        raise ConfigError("probes is empty; at least one is needed")
    if any(name in config for name in ("escalate", "loki", "state", "prefix")):
        from watchdog_agent.config import escalation

        escalation.check(config)
    config["confirm"] = config["confirm"] or [_other_kind(config["probes"][0])]
    if config.get("repairs"):
        from watchdog_agent.config import repairs

        repairs.check(config, config["probes"])
    if config.get("gateway") or "gateway" in (config.get("labels") or ()):
        from watchdog_agent.config import gateway

        gateway.check(config)
    result: Config = validators.checked(config)
    return result


def _check_consul_tls(config: Document) -> None:
    """Check it for an https:// address; remove it for any other, which needs no TLS."""
    spec = config.pop("consul_tls", {})
    if not str(config.get("consul")).startswith("https://"):
        return
    if not isinstance(spec, dict):
        raise ConfigError("consul_tls must be an object")

    validators.check_trust(spec, "consul_tls")
    config["consul_tls"] = spec


def _other_kind(probe: Document) -> Probe:
    """The default confirmation: a probe of another kind than this one."""
    return probes.check(
        {"kind": "tcp", "port": 80} if probe["kind"] == "icmp" else {"kind": "icmp"}, ""
    )


def _check_identity(config: Document) -> None:
    for name in ("device_id", "slug"):
        if not isinstance(config.get(name), str) or not config[name]:
            raise ConfigError(f"{name} must be text and not empty")
    if not set(str(config["slug"])) <= set("abcdefghijklmnopqrstuvwxyz0123456789-"):
        raise ConfigError("slug may hold a-z, 0-9 and - only")
    config["address"] = validators.host(config.get("address"), "address")
    credential = config.get("credential", "")
    if not isinstance(credential, str) or any(not "!" <= c <= "~" for c in credential):
        raise ConfigError(
            "credential must be printable ASCII without blanks"
        )  # The message does not repeat it.
    for name in ("version", "agent_class", "spec_hash", "service", "check_interval", "ca_cert"):
        if not isinstance(config.get(name, ""), str):
            raise ConfigError(f"{name} is {config[name]!r}; it must be text")
    epoch = config.get("epoch")
    if type(epoch) is not int or epoch < 1:
        raise ConfigError(f"epoch is {epoch!r}; it must be a whole number from 1")


def instance_of(environ: Mapping[str, str]) -> str:
    """The ID of this run, from the scheduler if it sets one."""
    for name in ("WATCHDOG_INSTANCE", "NOMAD_ALLOC_ID", "POD_UID"):
        if environ.get(name):
            return environ[name][:128]
    return os.urandom(16).hex()


def listen_of(environ: Mapping[str, str]) -> tuple[str, int]:
    """(host, port) to listen on. Raises ConfigError."""
    text = environ.get("WATCHDOG_LISTEN", "")
    if not text and environ.get("NOMAD_PORT_http"):
        text = f"{environ.get('NOMAD_IP_http') or '127.0.0.1'}:{environ['NOMAD_PORT_http']}"
    host, separator, port = (text or "127.0.0.1:0").rpartition(":")
    try:
        return host.strip("[]"), parsing.whole(port if separator else "", 0, 65535)
    except ValueError:
        raise ConfigError(f"WATCHDOG_LISTEN is {text!r}; it must be host:port") from None


def state_dir_of(environ: Mapping[str, str]) -> str:
    """The directory for stored state; "" = none."""
    if environ.get("WATCHDOG_STATE_DIR"):
        return environ["WATCHDOG_STATE_DIR"]
    folder = environ.get("NOMAD_ALLOC_DIR")
    return os.path.join(folder, "data") if folder else ""

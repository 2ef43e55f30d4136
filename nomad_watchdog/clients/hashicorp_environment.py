"""The environment variables of Nomad and Consul, with the same meaning as in their own command lines.

The rules are those of `DefaultConfig` and `NewClient` in the packages `api` of Nomad 1.6 and Consul 1.14;
tests/clients/test_hashicorp_environment.py compares with the real programs. This is the only module that reads these
variables, for the control plane, the agents' document, doctor and the CLI.
"""

from __future__ import annotations

import codecs
import contextlib
import ipaddress
import re
import ssl
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import SplitResult, urlsplit

from nomad_watchdog import secret_file_rules, text_files
from nomad_watchdog.errors import UserError
from nomad_watchdog.secret_values import know

NOMAD: Final[Mapping[str, str]] = {
    "NOMAD_ADDR": "address",
    "NOMAD_NAMESPACE": "namespace",
    "NOMAD_REGION": "region",
    "NOMAD_TOKEN_FILE": "token_file",
    "NOMAD_CACERT": "ca_cert",
    "NOMAD_CAPATH": "ca_path",
    "NOMAD_CLIENT_CERT": "client_cert",
    "NOMAD_CLIENT_KEY": "client_key",
    "NOMAD_SKIP_VERIFY": "tls_skip_verify",
    "NOMAD_TLS_SERVER_NAME": "tls_server_name",
}
"""Variable → setting of the block `nomad`. NOMAD_TOKEN_FILE is an addition: the CLI has only NOMAD_TOKEN."""
CONSUL: Final[Mapping[str, str]] = {
    "CONSUL_HTTP_ADDR": "address",
    "CONSUL_NAMESPACE": "namespace",
    "CONSUL_HTTP_TOKEN_FILE": "token_file",
    "CONSUL_CACERT": "ca_cert",
    "CONSUL_CAPATH": "ca_path",
    "CONSUL_CLIENT_CERT": "client_cert",
    "CONSUL_CLIENT_KEY": "client_key",
    "CONSUL_HTTP_SSL_VERIFY": "tls_skip_verify",
    "CONSUL_TLS_SERVER_NAME": "tls_server_name",
}
"""Variable → setting of the block `consul`."""
SSL: Final = "CONSUL_HTTP_SSL"
VARIABLES: Final[Mapping[str, tuple[str, str]]] = {
    **{variable: ("nomad", setting) for variable, setting in NOMAD.items()},
    **{variable: ("consul", setting) for variable, setting in CONSUL.items()},
}
_UNSUPPORTED: Final[Mapping[str, Mapping[str, str]]] = {
    "nomad": {"NOMAD_HTTP_AUTH": "basic authentication"},
    "consul": {
        "CONSUL_HTTP_AUTH": "basic authentication",
        "CONSUL_PARTITION": "a Consul partition",
    },
}
_TRUE: Final = frozenset({"1", "t", "T", "TRUE", "true", "True"})
_FALSE: Final = frozenset({"0", "f", "F", "FALSE", "false", "False"})
_BRACKETS: Final = re.compile(r"\[[^\[\]]+\](:[0-9]*)?")
_MAX_LABEL: Final = 63
"""Characters between two dots of a host name (RFC 1035)."""
_LINK_LOCAL: Final = ("fe8", "fe9", "fea", "feb")
"""Beginnings of IPv6 addresses in fe80::/10."""
ADDRESS: Final = "write http://HOST:PORT or https://HOST:PORT"


def is_true(text: str) -> bool:
    """A boolean as Go's strconv.ParseBool reads it. Raises ValueError for anything else."""
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError(f"{text_files.shown(text)} is not a boolean; write true or false")


def checked_address(text: str) -> str:
    """An address of a server with its scheme (http if it has none) and without a slash at its end.

    Without a port it means the port of the scheme, 80 or 443. Raises ValueError."""
    if text.startswith("unix:"):
        raise ValueError(
            f"{text_files.shown(text)} is a Unix socket, which is not supported; {ADDRESS}"
        )
    whole = text if "://" in text else f"http://{text}"
    scheme, _, rest = whole.partition("://")
    authority = rest.partition("/")[0]
    if _is_bare_ipv6(authority):
        raise ValueError(
            f"{text_files.shown(text)}: an IPv6 address needs brackets: write {scheme}://{_bracketed(authority)}, or "
            "http://[ADDRESS]:PORT"
        )
    parts = _split(whole, authority)
    if parts is None:
        raise ValueError(f"{text_files.shown(text)} is not an address; {ADDRESS}")
    if any(not "!" <= character <= "~" for character in whole):
        raise ValueError(
            f"{text_files.shown(text)} contains characters that are not allowed in an address; {ADDRESS}"
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("an address must not contain a user, password, query or fragment")
    _check_interface(text, parts)
    _check_host(text, parts.hostname or "")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def _check_host(text: str, host: str) -> None:
    """Raises ValueError for a name that can't be looked up."""
    labels = host.removesuffix(".").split(".")
    if ":" not in host and not all(0 < len(one) <= _MAX_LABEL for one in labels):
        raise ValueError(
            f"{text_files.shown(text)} has a host name that no host can have; {ADDRESS}"
        )


def _check_interface(text: str, parts: SplitResult) -> None:
    """Raises ValueError for a link-local address without a network interface."""
    host = parts.hostname or ""
    if host.startswith(_LINK_LOCAL) and ":" in host and "%" not in parts.netloc:
        port = f":{parts.port}" if parts.port else ""
        raise ValueError(
            f"{text_files.shown(text)}: a link-local address needs its network interface: "
            f"write {parts.scheme}://[{host}%25eth0]{port}"
        )


def _split(whole: str, authority: str) -> SplitResult | None:
    """The parts of an HTTP URL; None if it is not one, or if its host or port is not valid."""
    try:
        parts = urlsplit(whole)
        port = parts.port
    except ValueError:
        return None
    if "[" in authority and not _BRACKETS.fullmatch(authority):
        return None
    valid = parts.scheme in ("http", "https") and parts.hostname and port != 0
    return parts if valid else None


def _is_bare_ipv6(authority: str) -> bool:
    """Whether it is an IPv6 address without brackets, possibly followed by a port."""
    if authority.count(":") < 2 or "[" in authority or "@" in authority:
        return False
    try:
        ipaddress.IPv6Address(authority.partition("%")[0])
    except ValueError:
        return all(part.isalnum() or not part for part in authority.split(":"))
    return True


def _bracketed(authority: str) -> str:
    """A bare IPv6 address in brackets. The part after the last colon counts as a port if it looks like one and
    the rest is an address: ::1:8500 most likely means port 8500."""
    host, _, port = authority.rpartition(":")
    if port.isascii() and port.isdigit() and (len(port) > 3 or port in ("80", "443")):
        with contextlib.suppress(ValueError):
            ipaddress.IPv6Address(host.partition("%")[0])
            return f"[{host}]:{port}"
    return f"[{authority}]"


def host_and_port(address: str) -> tuple[str, int]:
    """Host and port of a checked address: the host as in a URL; the port is by default that of the scheme."""
    parts = urlsplit(address)
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return (f"[{host}]" if ":" in host else host), port


def value_of(variable: str, text: str) -> str | bool:
    """The value of a variable as the value of its setting. Raises ValueError with a message for the user."""
    if variable == "NOMAD_SKIP_VERIFY":
        return is_true(text)
    if variable == "CONSUL_HTTP_SSL_VERIFY":
        return not is_true(text)
    if variable == "NOMAD_ADDR":
        # Nomad's CLI ignores the path of the address and uses /v1 of the host.
        parts = urlsplit(checked_address(text))
        return f"{parts.scheme}://{parts.netloc}"
    if variable == "CONSUL_HTTP_ADDR":
        return checked_address(text)
    return text


def secured(address: str, env: Mapping[str, str]) -> str:
    """The address of Consul, with https instead of http if CONSUL_HTTP_SSL is true.

    Raises ValueError when that variable is not a boolean."""
    if env.get(SSL) and is_true(env[SSL]) and address.startswith("http://"):
        return f"https://{address.removeprefix('http://')}"
    return address


def settings_with(
    block: str, token: str, env: Mapping[str, str], explicit: Mapping[str, object]
) -> dict[str, Any]:
    """The settings of the block "nomad" or "consul"; `explicit` overrides the variables. `token`: the variable with
    the token itself. Raises UserError that names an invalid variable."""
    refuse_unsupported(block, env)
    values: dict[str, object] = dict(settings_from({"nomad": NOMAD, "consul": CONSUL}[block], env))
    if "token" in explicit:
        values.pop("token_file", None)
    elif env.get(token):
        values["token"] = env[token]
        know(env[token])
    return {**values, **explicit}


def settings_from(names: Mapping[str, str], env: Mapping[str, str]) -> dict[str, str | bool]:
    """The settings from these variables. Raises UserError that names an invalid variable."""
    found: dict[str, str | bool] = {}
    for variable, setting in names.items():
        if env.get(variable):
            try:
                found[setting] = value_of(variable, env[variable])
            except ValueError as error:
                raise UserError(f"{variable}: {error}") from None
    return found


def refuse_unsupported(block: str, env: Mapping[str, str]) -> None:
    """Raises UserError for a variable that the vendor's CLI supports but this project does not."""
    for variable, what in _UNSUPPORTED[block].items():
        if env.get(variable):
            raise UserError(f"{variable}: {what} is not supported; unset it")


def trust(  # the parts of one context
    who: str,
    *,
    ca_cert: str = "",
    ca_path: str = "",
    client_cert: str = "",
    client_key: str = "",
    skip_verify: bool = False,
) -> ssl.SSLContext:
    """The TLS context of a client. A file of authorities takes precedence over a folder, of which all files are
    loaded, as in the vendors' CLIs. Raises UserError that names the file that cannot be used."""
    if ca_cert or ca_path:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        for file in [Path(ca_cert)] if ca_cert else files_of(f"{who}.ca_path", ca_path):
            load_authorities(f"{who}.ca_cert" if ca_cert else f"{who}.ca_path", file, context)
    else:
        context = ssl.create_default_context()
    if client_cert:
        try:
            load_chain(context, client_cert, client_key)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            setting = f"{who}.client_cert {text_files.shown(client_cert)} and its key {text_files.shown(client_key)}"
            raise UserError(f"{setting}: {_reason(error)}") from error
    if skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def files_of(setting: str, folder: str) -> list[Path]:
    """The files of a folder of authorities. Raises UserError when it cannot be listed or is empty."""
    try:
        found = sorted(path for path in Path(folder).iterdir() if path.is_file())
    except OSError as error:
        raise UserError(f"{setting} {text_files.shown(folder)}: {_reason(error)}") from error
    if not found:
        raise UserError(f"{setting} {text_files.shown(folder)} contains no file")
    return found


def load_chain(context: ssl.SSLContext, cert: str, key: str = "") -> None:
    """Load a certificate and its key, which may be in the same file. Either file may begin with a byte order mark,
    which OpenSSL does not skip. Raises OSError; never prompts for a password."""
    secret_file_rules.check(key or cert)
    raw = [Path(path).read_bytes() for path in (cert, key) if path]
    if not any(one.startswith(codecs.BOM_UTF8) for one in raw):
        context.load_cert_chain(cert, key or None, password="")
        return
    # OpenSSL reads a chain only from a file. The temporary file is private and deleted at once.
    with tempfile.NamedTemporaryFile(prefix="nomad-watchdog-") as file:
        file.write(b"\n".join(one.removeprefix(codecs.BOM_UTF8) for one in raw))
        file.flush()
        context.load_cert_chain(file.name, password="")


def load_authorities(setting: str, file: Path, context: ssl.SSLContext) -> None:
    """Trust the certificates of a file, which may contain a byte order mark and comments. Raises UserError that
    begins with `setting`."""
    certificates = text_files.only_pem(text_files.read(setting, file))
    try:
        context.load_verify_locations(cadata=certificates)
    except (OSError, ValueError) as error:  # ValueError: there are none
        raise UserError(f"{setting} {text_files.shown(str(file))}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError) or not isinstance(error, OSError):
        return "contains no usable certificate or key in PEM format"
    return error.strerror or "cannot be read"

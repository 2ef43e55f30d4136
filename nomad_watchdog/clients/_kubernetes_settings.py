"""Address and credentials of the Kubernetes API, from a kubeconfig file or from the service account of the pod.

The format is kubectl's (``v1 Config``). The obsolete ``auth-provider`` is rejected; exec credentials
(``client.authentication.k8s.io/v1``), which replaced it, are supported.
"""

from __future__ import annotations

import base64
import os
import ssl
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import yaml

from nomad_watchdog import text_files
from nomad_watchdog.errors import UserError

READ_S: Final = 30.0
"""Timeout of a call. The API server ends a request after 60 s; a list of 10,000 pods takes 3 s."""
IN_CLUSTER: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_MAX_BYTES: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class ExecPlugin:
    """A program that prints an ExecCredential."""

    command: str
    args: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    api_version: str = "client.authentication.k8s.io/v1"
    cluster_info: bool = False
    """It needs the cluster in KUBERNETES_EXEC_INFO."""


@dataclass(frozen=True, slots=True)
class KubernetesAccess:
    """One server and one user. Certificates are PEM texts, because a kubeconfig contains either texts or files."""

    server: str
    namespace: str = ""
    """Of the selected context; empty = it has none."""
    ca: str = ""
    client_cert: str = field(default="", repr=False)
    client_key: str = field(default="", repr=False)
    token: str = field(default="", repr=False)
    token_file: str = ""
    """Read again every minute and when the token is refused, because the kubelet rotates it."""
    exec_plugin: ExecPlugin | None = None
    skip_verify: bool = False
    tls_server_name: str = ""
    timeout_s: float = READ_S
    source: str = ""
    """Where these settings come from, for messages."""

    @classmethod
    def discover(
        cls,
        kubeconfig: str = "",
        context: str = "",
        env: Mapping[str, str] | None = None,
        *,
        service_account: str = "",
    ) -> KubernetesAccess:
        """From the first of: `kubeconfig`, ``KUBECONFIG`` (several files, joined by colons), the pod's
        service account, ``~/.kube/config``. `context`: empty = the file's current one. `service_account`:
        the folder with the pod's token; empty = where Kubernetes puts it.

        Raises UserError when there is none of them, or when one is not valid."""
        env = os.environ if env is None else env
        if kubeconfig:
            return from_files([Path(kubeconfig).expanduser()], context)
        if env.get("KUBECONFIG"):
            files = [Path(one).expanduser() for one in env["KUBECONFIG"].split(":") if one]
            return from_files(files, context)
        if env.get("KUBERNETES_SERVICE_HOST"):
            return in_cluster(env, Path(service_account or IN_CLUSTER))
        usual = Path(env.get("HOME", "/nonexistent")) / ".kube" / "config"
        if usual.is_file():
            return from_files([usual], context)
        raise UserError(
            "no Kubernetes configured: set kubernetes.kubeconfig or KUBECONFIG, or run in a pod with a service account"
        )

    def ssl_context(self, client_cert: str = "", client_key: str = "") -> ssl.SSLContext:
        """With this client certificate, by default that of the settings. Raises UserError when a certificate cannot
        be loaded."""
        cert, key = client_cert or self.client_cert, client_key or self.client_key
        try:
            context = ssl.create_default_context(cadata=self.ca or None)
            if cert:
                _load_chain(context, cert, key)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise UserError(f"kubernetes: cannot load the TLS certificates: {error}") from error
        if self.skip_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


def _load_chain(context: ssl.SSLContext, cert: str, key: str) -> None:
    """OpenSSL reads a chain only from a file. The temporary file is private and deleted at once."""
    with tempfile.NamedTemporaryFile("w", prefix="kube-", encoding="ascii") as file:
        file.write(f"{cert}\n{key}\n")
        file.flush()
        context.load_cert_chain(file.name)


def in_cluster(env: Mapping[str, str], folder: Path = IN_CLUSTER) -> KubernetesAccess:
    """The service account of this pod. Raises UserError when its files are missing."""
    host, port = env["KUBERNETES_SERVICE_HOST"], env.get("KUBERNETES_SERVICE_PORT", "443")
    if not (folder / "token").is_file():
        raise UserError(
            f"kubernetes: this pod has no service account token in {folder}: set "
            "automountServiceAccountToken in its spec, or set kubernetes.kubeconfig"
        )
    namespace = folder / "namespace"
    return KubernetesAccess(
        server=f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}",
        namespace=text_files.read("kubernetes:", namespace).strip() if namespace.is_file() else "",
        ca=_pem(folder / "ca.crt"),
        token_file=str(folder / "token"),
        source="service account",
    )


@dataclass(frozen=True, slots=True)
class _Entry:
    """A named cluster, user or context of a kubeconfig file. `folder`: its relative paths start there."""

    block: Mapping[str, object]
    folder: Path

    def text(self, key: str) -> str:
        return str(self.block.get(key) or "")


class _Kubeconfig:
    """The merged content of several files. Of entries with the same name, that of the first file counts, as in
    kubectl."""

    def __init__(self) -> None:
        self.current = ""
        self._entries: dict[str, dict[str, _Entry]] = {"cluster": {}, "user": {}, "context": {}}

    def add(self, file: Path) -> None:
        """Raises UserError when the file is not a kubeconfig."""
        document = _document(file)
        for kind, found in self._entries.items():
            for entry in _list(document.get(f"{kind}s"), f"kubeconfig {file}", f"{kind}s"):
                if not isinstance(entry, dict) or not isinstance(name := entry.get("name"), str):
                    continue
                block = entry.get(kind) or {}
                if not isinstance(block, dict):
                    raise UserError(f"kubeconfig {file}: {kind} {name!r} is not a mapping")
                found.setdefault(name, _Entry(block, file.parent))
        self.current = self.current or str(document.get("current-context") or "")

    def entry(self, kind: str, name: str, where: str) -> _Entry:
        """Raises UserError when there is none of this kind and name."""
        found = self._entries[kind]
        if name not in found:
            known = ", ".join(sorted(found)) or "none"
            raise UserError(f"{where}: no {kind} {name!r}; there are: {known}")
        return found[name]


def from_files(files: list[Path], context: str = "") -> KubernetesAccess:
    """The selected context of the files; `context`: empty = the current one. Raises UserError."""
    existing = [file for file in files if file.is_file()]
    if not existing:
        raise UserError(f"kubeconfig {', '.join(map(str, files))}: no such file")
    config = _Kubeconfig()
    for file in existing:
        config.add(file)
    where = f"kubeconfig {existing[0]}"
    name = context or config.current
    if not name:
        raise UserError(f"{where}: no current-context; set kubernetes.context")
    chosen = config.entry("context", name, where)
    cluster = config.entry("cluster", str(chosen.block.get("cluster")), where)
    user = _Entry({}, cluster.folder)
    if chosen.block.get("user"):
        user = config.entry("user", chosen.text("user"), where)
    _check_supported(cluster, user, where)
    token_file = user.text("tokenFile")
    return KubernetesAccess(
        server=cluster.text("server").rstrip("/"),
        namespace=chosen.text("namespace"),
        ca=_pem_of(cluster, "certificate-authority"),
        client_cert=_pem_of(user, "client-certificate"),
        client_key=_pem_of(user, "client-key"),
        token=user.text("token"),
        token_file=str(user.folder / token_file) if token_file else "",
        exec_plugin=_exec(user.block.get("exec"), user.folder, where),
        skip_verify=bool(cluster.block.get("insecure-skip-tls-verify")),
        tls_server_name=cluster.text("tls-server-name"),
        source=f"{where}, context {name}",
    )


def _check_supported(cluster: _Entry, user: _Entry, where: str) -> None:
    """Raises UserError for a cluster or user that cannot be used."""
    if "auth-provider" in user.block:
        raise UserError(f"{where}: auth-provider is not supported; use exec credentials")
    if cluster.block.get("proxy-url"):
        raise UserError(
            f"{where}: proxy-url of the cluster is not supported; set a server that can be reached "
            "directly, or remove proxy-url if the proxy is not needed"
        )
    if not _is_url(cluster.text("server").rstrip("/")):
        raise UserError(f"{where}: the server of the cluster must be https://host:port")


def _document(file: Path) -> Mapping[str, object]:
    text = text_files.read("kubeconfig", file, _MAX_BYTES)
    try:
        document = yaml.safe_load(text)
    except ValueError:  # a number of more than 4,300 digits, or a date that does not exist
        raise UserError(f"kubeconfig {file} contains an invalid number or date") from None
    except yaml.YAMLError as error:
        mark = getattr(
            error, "problem_mark", None
        )  # not the error's text, which quotes the file (S10)
        at = f", line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"kubeconfig {file} is not YAML{at}") from None
    if not isinstance(document, dict):
        raise UserError(f"kubeconfig {file} contains no document")
    return document


def _is_url(server: str) -> bool:
    try:
        parts = urlsplit(server)
        _ = parts.port
    except ValueError:  # invalid brackets or port
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc


def _list(value: object, where: str, what: str) -> list[object]:
    if not value:
        return []
    if not isinstance(value, list):
        raise UserError(f"{where}: {what} is not a list")
    return value


def _exec(block: object, folder: Path, where: str) -> ExecPlugin | None:
    if not block:
        return None
    if not isinstance(block, dict) or not block.get("command"):
        raise UserError(f"{where}: exec has no command")
    command = str(block["command"])
    # as in kubectl: a path with a slash is relative to the file, a name without one is searched on PATH
    if "/" in command:
        command = str(folder / command)
    env: list[tuple[str, str]] = []
    for one in _list(block.get("env"), where, "exec.env"):
        if not isinstance(one, dict) or not {"name", "value"} <= one.keys():
            raise UserError(f"{where}: each entry of exec.env needs a name and a value")
        env.append((str(one["name"]), str(one["value"])))
    return ExecPlugin(
        command=command,
        args=tuple(str(one) for one in _list(block.get("args"), where, "exec.args")),
        env=tuple(env),
        api_version=str(block.get("apiVersion") or "client.authentication.k8s.io/v1"),
        cluster_info=bool(block.get("provideClusterInfo")),
    )


def _pem_of(entry: _Entry, key: str) -> str:
    if data := entry.text(f"{key}-data"):
        try:
            # Line breaks are not part of base64, but other readers ignore them (kr8s#484).
            raw = base64.b64decode("".join(data.split()), validate=True)
        except ValueError:
            raise UserError(f"kubeconfig: {key}-data is not base64") from None
        return _only_pem(
            f"kubeconfig: {key}-data", text_files.decoded(f"kubeconfig: {key}-data", raw)
        )
    file = entry.text(key)
    return _pem(entry.folder / file) if file else ""


def _pem(path: Path) -> str:
    return _only_pem(f"kubernetes: {path}", text_files.read("kubernetes:", path))


def _only_pem(where: str, text: str) -> str:
    """Remove comments, which may contain any characters (sslyze#670)."""
    found = text_files.only_pem(text)
    if not found and not text.isascii():
        raise UserError(f"{where} contains no certificate or key in PEM format")
    return found or text  # anything else is rejected where it is used

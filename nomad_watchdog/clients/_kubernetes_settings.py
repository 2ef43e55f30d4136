"""Where the Kubernetes API is and who we are: a kubeconfig file, or the pod that we run in.

The format is kubectl's (``v1 Config``). Plugins of the past (``auth-provider``) are refused by name; the
exec credentials that have replaced them work (``client.authentication.k8s.io/v1``).
"""

from __future__ import annotations

import base64
import os
import ssl
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import yaml

from nomad_watchdog import text_files
from nomad_watchdog.errors import UserError

READ_S: Final = 30.0
"""The API server ends a request of its own after 60 s; a list of 10,000 pods takes 3."""
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
    """It wants to be told of the cluster."""


@dataclass(frozen=True, slots=True)
class KubernetesAccess:
    """One server and one user. Certificates are PEM texts, for a kubeconfig holds either those or files."""

    server: str
    namespace: str = ""
    """Of the chosen context; empty = it names none."""
    ca: str = ""
    client_cert: str = field(default="", repr=False)
    client_key: str = field(default="", repr=False)
    token: str = field(default="", repr=False)
    token_file: str = ""
    """Read again every minute and when the token is refused: the kubelet rotates it."""
    exec_plugin: ExecPlugin | None = None
    skip_verify: bool = False
    tls_server_name: str = ""
    timeout_s: float = READ_S
    source: str = ""
    """Where this was found, for messages."""

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

        Raises UserError when there is none of them, or when one can't be understood."""
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
            "no Kubernetes: set kubernetes.kubeconfig or KUBECONFIG, or run in a pod with a service account"
        )

    def ssl_context(self, client_cert: str = "", client_key: str = "") -> ssl.SSLContext:
        """With the client certificate given here, else that of the settings. Raises UserError when a
        certificate can't be read."""
        cert, key = client_cert or self.client_cert, client_key or self.client_key
        try:
            context = ssl.create_default_context(cadata=self.ca or None)
            if cert:
                _load_chain(context, cert, key)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise UserError(f"kubernetes: can't load the TLS certificates: {error}") from error
        if self.skip_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


def _load_chain(context: ssl.SSLContext, cert: str, key: str) -> None:
    """OpenSSL reads a chain from a file only: one that nobody else can read, and that is gone at once."""
    with tempfile.NamedTemporaryFile("w", prefix="kube-", encoding="ascii") as file:
        file.write(f"{cert}\n{key}\n")
        file.flush()
        context.load_cert_chain(file.name)


def in_cluster(env: Mapping[str, str], folder: Path = IN_CLUSTER) -> KubernetesAccess:
    """The service account of the pod that we run in. Raises UserError when its files are not there."""
    host, port = env["KUBERNETES_SERVICE_HOST"], env.get("KUBERNETES_SERVICE_PORT", "443")
    if not (folder / "token").is_file():
        raise UserError(
            f"kubernetes: this pod has no service account token in {folder}: set "
            "automountServiceAccountToken in its spec, or name a kubeconfig"
        )
    namespace = folder / "namespace"
    return KubernetesAccess(
        server=f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}",
        namespace=text_files.read("kubernetes:", namespace).strip() if namespace.is_file() else "",
        ca=_pem(folder / "ca.crt"),
        token_file=str(folder / "token"),
        source="service account",
    )


def from_files(files: list[Path], context: str = "") -> KubernetesAccess:
    """The chosen context of the files; of what has the same name the first file's counts, as in kubectl.

    Raises UserError with what is wrong."""
    clusters: dict[str, tuple[Mapping[str, Any], Path]] = {}
    users: dict[str, tuple[Mapping[str, Any], Path]] = {}
    contexts: dict[str, tuple[Mapping[str, Any], Path]] = {}
    current = context
    there = [file for file in files if file.is_file()]
    if not there:
        raise UserError(f"kubeconfig {', '.join(map(str, files))}: no such file")
    for file in there:
        document = _document(file)
        for key, kind, found in (
            ("clusters", "cluster", clusters),
            ("users", "user", users),
            ("contexts", "context", contexts),
        ):
            for entry in _list(document.get(key), f"kubeconfig {file}", key):
                if isinstance(entry, dict) and isinstance(entry.get("name"), str):
                    block = entry.get(kind) or {}
                    if not isinstance(block, dict):
                        raise UserError(
                            f"kubeconfig {file}: {kind} {entry['name']!r} is no mapping"
                        )
                    found.setdefault(entry["name"], (block, file.parent))
        current = current or str(document.get("current-context") or "")
    where = f"kubeconfig {there[0]}"
    if not current:
        raise UserError(f"{where}: no current-context; set kubernetes.context")
    chosen, _ = _entry(contexts, current, where, "context")
    cluster, base = _entry(clusters, str(chosen.get("cluster")), where, "cluster")
    user: Mapping[str, Any] = {}
    user_base = base
    if chosen.get("user"):
        user, user_base = _entry(users, str(chosen["user"]), where, "user")
    if "auth-provider" in user:
        raise UserError(f"{where}: auth-provider is no longer supported; use exec credentials")
    if cluster.get("proxy-url"):
        raise UserError(
            f"{where}: proxy-url of the cluster is not supported; name a server that can be reached "
            "directly, or take it out where the proxy is not needed"
        )
    server = str(cluster.get("server") or "").rstrip("/")
    if not _is_url(server):
        raise UserError(f"{where}: the server of the cluster must be https://host:port")
    return KubernetesAccess(
        server=server,
        namespace=str(chosen.get("namespace") or ""),
        ca=_pem_of(cluster, "certificate-authority", base),
        client_cert=_pem_of(user, "client-certificate", user_base),
        client_key=_pem_of(user, "client-key", user_base),
        token=str(user.get("token") or ""),
        token_file=str(user_base / str(user["tokenFile"])) if user.get("tokenFile") else "",
        exec_plugin=_exec(user.get("exec"), user_base, where),
        skip_verify=bool(cluster.get("insecure-skip-tls-verify")),
        tls_server_name=str(cluster.get("tls-server-name") or ""),
        source=f"{where}, context {current}",
    )


def _document(file: Path) -> Mapping[str, Any]:
    text = text_files.read("kubeconfig", file, _MAX_BYTES)
    try:
        document = yaml.safe_load(text)
    except ValueError:  # a number of more than 4,300 digits, or a date that does not exist
        raise UserError(f"kubeconfig {file} holds a number or a date that can't be read") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)  # not its text: that quotes the file (S10)
        at = f", line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"kubeconfig {file} is no YAML{at}") from None
    if not isinstance(document, dict):
        raise UserError(f"kubeconfig {file} holds no document")
    return document


def _entry(
    found: Mapping[str, tuple[Mapping[str, Any], Path]], name: str, where: str, kind: str
) -> tuple[Mapping[str, Any], Path]:
    if name not in found:
        there = ", ".join(sorted(found)) or "none"
        raise UserError(f"{where}: no {kind} {name!r}; there are: {there}")
    return found[name]


def _is_url(server: str) -> bool:
    try:
        parts = urlsplit(server)
        _ = parts.port
    except ValueError:  # brackets or a port that make no sense
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc


def _list(value: Any, where: str, what: str) -> list[Any]:
    if not isinstance(value or [], list):
        raise UserError(f"{where}: {what} is no list")
    return value or []


def _exec(block: Any, base: Path, where: str) -> ExecPlugin | None:
    if not block:
        return None
    if not isinstance(block, dict) or not block.get("command"):
        raise UserError(f"{where}: exec names no command")
    command = str(block["command"])
    # as kubectl: a path with a slash is relative to the file, a bare name is looked for on PATH
    if "/" in command:
        command = str(base / command)
    env = _list(block.get("env"), where, "exec.env")
    if not all(isinstance(one, dict) and {"name", "value"} <= one.keys() for one in env):
        raise UserError(f"{where}: each entry of exec.env needs a name and a value")
    return ExecPlugin(
        command=command,
        args=tuple(str(one) for one in _list(block.get("args"), where, "exec.args")),
        env=tuple((str(one["name"]), str(one["value"])) for one in env),
        api_version=str(block.get("apiVersion") or "client.authentication.k8s.io/v1"),
        cluster_info=bool(block.get("provideClusterInfo")),
    )


def _pem_of(block: Mapping[str, Any], key: str, base: Path) -> str:
    if block.get(f"{key}-data"):
        try:
            # Line breaks are no part of base64, and other readers pass over them (kr8s#484).
            packed = "".join(str(block[f"{key}-data"]).split())
            raw = base64.b64decode(packed, validate=True)
        except ValueError:
            raise UserError(f"kubeconfig: {key}-data is not base64") from None
        return _only_pem(
            f"kubeconfig: {key}-data", text_files.decoded(f"kubeconfig: {key}-data", raw)
        )
    return _pem(base / str(block[key])) if block.get(key) else ""


def _pem(path: Path) -> str:
    return _only_pem(f"kubernetes: {path}", text_files.read("kubernetes:", path))


def _only_pem(where: str, text: str) -> str:
    """Without comments, which may be in any language (sslyze#670)."""
    found = text_files.only_pem(text)
    if not found and not text.isascii():
        raise UserError(f"{where} holds no certificate or key in PEM form")
    return found or text  # what is no PEM is refused where it is used

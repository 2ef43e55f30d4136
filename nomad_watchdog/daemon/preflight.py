"""Checks the files that the configuration names: tokens, keys, certificates, templates and inventories.

They are read by the same code as in `run`. Connects to nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path as FilePath

from nomad_watchdog import private_files, schedulers, secret_file_rules, text_files
from nomad_watchdog.api.auth import authenticator_of
from nomad_watchdog.api.auth import secret_files as secret_files_of
from nomad_watchdog.api.listener import outgoing_context, tls_context
from nomad_watchdog.config.hcl import Path
from nomad_watchdog.config.settings import Settings, template_text
from nomad_watchdog.controllers import inventory_file
from nomad_watchdog.daemon.factory import consul_settings, kubernetes_settings, nomad_settings
from nomad_watchdog.errors import UserError
from nomad_watchdog.model import AgentSpec
from nomad_watchdog.schedulers.job_templates import UndeclaredError


def misfits(settings: Settings, env: Mapping[str, str]) -> Iterator[tuple[Path, str]]:
    """All errors: the setting, and what is wrong. `env`: for the vendors' tokens."""
    yield from _api(settings)
    yield from _servers(settings, env)
    yield from _classes(settings)
    yield from _pools(settings)
    for path in settings.inventory:
        for line in _lines(lambda path=path: _inventory(path, settings)):  # type: ignore[misc]  # typed by its use
            yield ("inventory",), line


def exposed(settings: Settings, config: FilePath | None = None) -> Iterator[tuple[str, str, str]]:
    """Files that work but that other users can read or write: the setting, what is wrong, and the fix. `config`: the
    configuration file."""
    api = settings.api
    secret = {".".join(("api", *at)): str(one.path) for at, one in secret_files_of(api).items()}
    for block in ("api", "nomad", "consul"):
        for name in ("token_file", "tls_key", "client_key"):
            if path := getattr(getattr(settings, block), name, None):
                secret[f"{block}.{name}"] = path
    for name, pool in settings.agent_pool.items():
        for metric in pool.metric:
            if metric.token_file:
                secret[f"agent_pool.{name}.metric.token_file"] = metric.token_file
    for setting, path in secret.items():
        if why := secret_file_rules.exposed(path):
            yield (
                setting,
                f"{text_files.shown(path)} {why}",
                f"chmod 600 {path}, or 640 with a group",
            )
    if config is not None and (why := secret_file_rules.foreign_path(config)):
        yield (
            "config",
            f"{text_files.shown(str(config))} {why}",
            f"chown it, and chmod go-w {config}",
        )
    stores = (settings.registry_path, settings.events_path, settings.published_events_path)
    for path_, mode in ((FilePath(settings.data_dir), "700"), *((one, "600") for one in stores)):
        if why := private_files.open_to(path_):
            yield "data_dir", f"{text_files.shown(str(path_))} {why}", f"chmod {mode} {path_}"


def _api(settings: Settings) -> Iterator[tuple[Path, str]]:
    api, wrong = settings.api, False
    for setting, file in secret_files_of(api).items():
        for line in _lines(file.required):
            wrong = True
            # The location of the error has the setting already.
            yield ("api", *setting), line.removeprefix(f"{file.setting} ")
    if not wrong:  # then check them together
        yield from ((("api", "token"), line) for line in _lines(lambda: authenticator_of(api)))
    own = list(_lines(lambda: tls_context(api)))
    yield from ((("api", "tls_cert"), line) for line in own)
    if api.ca_cert and not own:
        yield from ((("api", "ca_cert"), line) for line in _lines(lambda: outgoing_context(api)))


def _servers(settings: Settings, env: Mapping[str, str]) -> Iterator[tuple[Path, str]]:
    reads: list[tuple[str, Callable[[], object]]] = []
    if settings.registry_kind == "consul" or settings.agent_consul:
        reads.append(("consul", lambda: consul_settings(settings, env).read_token()))
        reads.append(("consul", lambda: consul_settings(settings, env).ssl_context()))
    if settings.backend == "nomad":
        reads.append(("nomad", lambda: nomad_settings(settings, env).read_token()))
        reads.append(("nomad", lambda: nomad_settings(settings, env).ssl_context()))
    for block, read in reads:
        yield from (((block,), line) for line in _lines(read))
    if settings.backend == "kubernetes" and settings.kubernetes.kubeconfig:
        where = ("kubernetes", "kubeconfig")
        yield from ((where, line) for line in _lines(lambda: kubernetes_settings(settings)))


def _classes(settings: Settings) -> Iterator[tuple[Path, str]]:
    try:
        specs, unreadable = settings.readable_specs()
    except UserError as error:
        yield ("api", "ca_cert"), str(error)
        return
    for name, why in unreadable.items():
        yield ("agent_class", name, "template"), why
    for name, kind in settings.agent_class.items():
        for backend in {settings.backend, *kind.on}:
            if name in specs:
                where: Path = (
                    "agent_class",
                    name,
                    *(("on", backend) if backend in kind.on else ()),
                )
                yield from _spec(where, backend, settings.spec_on(backend, specs[name]))


def _spec(where: Path, backend: str, spec: AgentSpec) -> Iterator[tuple[Path, str]]:
    try:
        schedulers.check_spec(backend, spec)
    except UndeclaredError as error:
        yield (*where, "variables", error.variable), str(error)
    except UserError as error:
        yield (*where, "template"), str(error)


def _pools(settings: Settings) -> Iterator[tuple[Path, str]]:
    for name, pool in settings.agent_pool.items():
        where: Path = ("agent_pool", name)
        if pool.template:
            template = pool.template
            for line in _lines(lambda template=template: template_text(template)):  # type: ignore[misc]  # as above
                yield (*where, "template"), line
        for number, metric in enumerate(pool.metric):
            if file := metric.token_file:
                for line in _lines(lambda file=file: text_files.token("token_file", file)):  # type: ignore[misc]  # as above
                    yield (*where, "metric", number, "token_file"), line.removeprefix("token_file ")


def _inventory(path: str, settings: Settings) -> object:
    return inventory_file.read(path, inventory_file.signature(path), settings.agent_class)


def _lines(read: Callable[[], object]) -> Iterator[str]:
    try:
        read()
    except UserError as error:
        yield from str(error).splitlines()

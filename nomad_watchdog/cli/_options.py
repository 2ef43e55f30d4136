"""What commands share: settings, the API client, ``-o``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import click
from click.core import ParameterSource

from nomad_watchdog import text_files
from nomad_watchdog.cli._api_client import TIMEOUT_S, ApiClient
from nomad_watchdog.errors import UserError
from nomad_watchdog.secret_values import know

if TYPE_CHECKING:
    from ssl import SSLContext

    from nomad_watchdog.config.api import ApiSettings as ApiBlock
    from nomad_watchdog.config.settings import Settings

FILE_NAME: Final = "nomad-watchdog.hcl"
DEFAULT_ADDRESS: Final = "http://127.0.0.1:9670"
F = TypeVar("F", bound=Callable[..., object])


def output_option(*formats: str) -> Callable[[F], F]:
    """``-o/--output``: the first format is the default."""
    return click.option(
        "-o",
        "--output",
        type=click.Choice(formats or ("table", "json", "wide")),
        default=(formats or ("table",))[0],
        show_default=True,
        help="Output format.",
    )


def refuse_options(ctx: click.Context, what: str) -> None:
    """Raises UserError for options before the name of a subcommand: they would have no effect. `what`: what the
    subcommand applies to, such as "migration"."""
    given = [
        one.opts[-1]
        for one in ctx.command.params
        if one.name
        and one.expose_value
        and ctx.get_parameter_source(one.name) is ParameterSource.COMMANDLINE
    ]
    if given:
        command = ctx.invoked_subcommand
        raise UserError(
            f"{ctx.command.name} {command} applies to the {what} in progress and does not support "
            f"{', '.join(given)}; its own options come after {command}"
        )


def settings_of(ctx: click.Context, file: str | None = None, *, whole: bool = False) -> Settings:
    """The settings: flags, else environment, else file, else defaults. `whole`: also check the files that they name."""
    from nomad_watchdog import logs
    from nomad_watchdog.config.load import Check, load, no_check

    logs.for_commands()
    also: Check = no_check
    if whole:
        from nomad_watchdog.daemon import preflight

        also = lambda settings: preflight.misfits(settings, os.environ)  # noqa: E731  # one line

    return load(
        file or ctx.obj["config"],
        os.environ,
        {"backend": ctx.obj["backend"]},
        also=also,
        options=lambda: set(_option_variables(ctx.find_root())),
    )


def _option_variables(ctx: click.Context) -> Iterator[str]:
    """The environment variables that click reads for options of commands."""
    verbs: list[tuple[str, click.Command]] = [(str(ctx.auto_envvar_prefix), ctx.command)]
    while verbs:
        prefix, verb = verbs.pop()
        for option in verb.params:
            if isinstance(option, click.Option) and not option.allow_from_autoenv:
                continue
            yield f"{prefix}_{(option.name or '').upper()}"
        if isinstance(verb, click.Group):
            found = ((name, verb.get_command(ctx, name)) for name in verb.list_commands(ctx))
            verbs += [
                (f"{prefix}_{name.upper().replace('-', '_')}", one) for name, one in found if one
            ]


def api_of(ctx: click.Context, *, timeout_s: float = TIMEOUT_S) -> ApiClient:
    """A client of the API at --address, else at the address in the configuration file. Raises UserError."""
    address, token_file = ctx.obj["address"], os.environ.get("NOMAD_WATCHDOG_TOKEN_FILE")
    authority = os.environ.get("NOMAD_WATCHDOG_CACERT", "")
    named = ctx.obj["config"]
    if not address and (named or Path(FILE_NAME).is_file()):
        try:
            settings = settings_of(ctx)
        except UserError as error:
            settings = _only_api(ctx, error)
        if not named:
            _check_sources(settings.api, os.environ)
        address, token_file = settings.advertise, token_file or settings.api.token_file
        authority = authority or settings.api.ca_cert or ""
    return ApiClient(
        address or DEFAULT_ADDRESS,
        _token(token_file),
        timeout_s=timeout_s,
        tls=lambda: _tls(authority, os.environ),
    )


def _token(file: str | None) -> str:
    """The API token: from this file, else from the environment. Raises UserError."""
    token = os.environ.get("NOMAD_WATCHDOG_TOKEN", "")
    if file:
        token = text_files.token("token file", file)
        if not token:
            raise UserError(f"token file {text_files.shown(file)} is empty")
    if token and not (token.isascii() and token.isprintable()):
        raise UserError("the API token contains characters that can't be sent")
    know(token)
    return token


def _only_api(ctx: click.Context, error: UserError) -> Settings:
    """The `api` block of an invalid configuration, which is all that a command needs to call the service. Raises
    UserError if that block is invalid too."""
    from nomad_watchdog.config.load import load_block
    from nomad_watchdog.terminal import clean

    settings = load_block("api", ctx.obj["config"], os.environ)
    if settings is None:
        raise UserError(
            f"{error}; to call the API without the configuration: --address URL (or NOMAD_WATCHDOG_ADDR) and "
            "NOMAD_WATCHDOG_TOKEN_FILE"
        ) from error
    if ctx.resilient_parsing:  # a shell completes: nothing may disturb the prompt
        return settings
    first, *more = str(error).splitlines()
    others = f" (and {len(more)} more: `nomad-watchdog config check`)" if more else ""
    click.echo(f"warning: only the api block is used: {clean(first)}{others}", err=True)
    return settings


def _check_sources(api: ApiBlock, env: Mapping[str, str]) -> None:
    """Raises UserError if the token and the address come from different sources: the environment, and the file in
    the working folder, which was not named."""

    def source(setting: str) -> str:
        variable = f"NOMAD_WATCHDOG_API_{setting.upper()}"
        if env.get(variable):
            return variable
        return FILE_NAME if setting in api.model_fields_set else ""

    ours = [name for name in ("NOMAD_WATCHDOG_TOKEN_FILE", "NOMAD_WATCHDOG_TOKEN") if env.get(name)]
    if ours and ours[0].endswith("TOKEN") and api.token_file:
        ours = []  # a file takes precedence
    sent = ours[0] if ours else source("token_file")
    where = source("advertise") or source("listen")
    if sent and where and (sent == FILE_NAME) != (where == FILE_NAME):
        raise UserError(
            f"the API's address comes from {where} and the token from {sent}; a token is sent only to an address "
            f"from its own source: give --address URL (or NOMAD_WATCHDOG_ADDR) and NOMAD_WATCHDOG_TOKEN_FILE, or "
            f"name the file with --config {FILE_NAME}"
        )


def _tls(authority: str, env: Mapping[str, str]) -> SSLContext:
    """TLS for calls to the API: how its certificate is verified, and the client certificate. Raises UserError."""
    import ssl

    from nomad_watchdog.clients import hashicorp_environment

    certificate = env.get("NOMAD_WATCHDOG_CLIENT_CERT", "")
    key = env.get("NOMAD_WATCHDOG_CLIENT_KEY", "")
    if bool(certificate) != bool(key):
        raise UserError("NOMAD_WATCHDOG_CLIENT_CERT and NOMAD_WATCHDOG_CLIENT_KEY must both be set")
    try:
        context = hashicorp_environment.trust("api", ca_cert=authority)
        if certificate:
            hashicorp_environment.load_chain(context, certificate, key)
    except OSError as error:  # ssl.SSLError too
        why = getattr(error, "reason", None) or error.strerror or "not PEM"
        raise UserError(f"TLS files of NOMAD_WATCHDOG_*: {why}") from error
    skip = env.get("NOMAD_WATCHDOG_SKIP_VERIFY", "").lower()
    if skip not in ("", "0", "false", "1", "true"):
        raise UserError("NOMAD_WATCHDOG_SKIP_VERIFY must be true or false")
    if skip in ("1", "true"):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def require_terminal() -> None:
    """Raises UserError if nobody can be asked."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UserError("no terminal for the confirmation; --auto-approve skips it")


def caller() -> str:
    """The user's name on this machine. The service records it, but does not trust it."""
    import getpass

    try:
        return getpass.getuser()[:64]
    except (OSError, KeyError):
        return "unknown"


def no_color(ctx: click.Context) -> bool:
    return bool(ctx.obj["no_color"])

"""``config check`` and ``config show``."""

from __future__ import annotations

import os
from collections.abc import Mapping

import click

from nomad_watchdog.cli._options import output_option, settings_of
from nomad_watchdog.terminal import clean, print_json


@click.group()
def config() -> None:
    """Check or show the configuration."""


@config.command()
@click.argument("file", required=False)
@click.pass_context
def check(ctx: click.Context, file: str | None) -> None:
    """Check FILE, or the configuration in use, and the files that it names.

    Reports all errors at once (exit 64), and warns of deprecated settings."""
    from nomad_watchdog.config.load import find_file

    settings = settings_of(ctx, file, whole=True)
    found = find_file(file or ctx.obj["config"], os.environ)
    for warning in settings.deprecated:
        click.echo(f"warning: {clean(warning)}", err=True)
    click.echo(f"{clean(found or 'built-in defaults')}: valid")


@config.command()
@output_option("table", "json")
@click.pass_context
def show(ctx: click.Context, output: str) -> None:
    """Show all effective settings; durations in seconds, sizes in bytes. Contains no secrets."""
    values: dict[str, object] = settings_of(ctx).model_dump(mode="json")
    if output == "json":
        print_json(values)
        return
    for name, value in _flat(values):
        click.echo(f"{clean(name)} = {clean(value)}")


def _flat(value: Mapping[str, object], prefix: str = "") -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for key, item in value.items():
        name = f"{prefix}{key}"
        rows += _flat(item, f"{name}.") if isinstance(item, dict) and item else [(name, item)]
    return rows

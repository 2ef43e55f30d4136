"""``nomad-watchdog doctor``."""

from __future__ import annotations

import asyncio
import os

import click

from nomad_watchdog.cli._options import no_color, output_option, settings_of
from nomad_watchdog.errors import UserError
from nomad_watchdog.terminal import print_json, print_table

EXIT_UNAVAILABLE = 69


@click.command()
@output_option("table", "json")
@click.pass_context
def doctor(ctx: click.Context, output: str) -> None:
    """Check the environment and suggest fixes. Exits 69 if a check fails."""
    from nomad_watchdog.config.load import find_file
    from nomad_watchdog.daemon.doctor.base import Check, CheckStatus
    from nomad_watchdog.daemon.doctor.checks import examine

    try:
        settings = settings_of(ctx)
    except UserError as error:
        fix = "see docs/configuration.md"
        checks = [Check("config", CheckStatus.FAIL, line, fix) for line in str(error).splitlines()]
    else:
        file = find_file(ctx.obj["config"], os.environ)
        checks = asyncio.run(examine(settings, os.environ, file))
    failed = any(check.status is CheckStatus.FAIL for check in checks)
    if output == "json":
        # `mend` is the former name of `fix`.
        found = [check._asdict() | {"mend": check.fix} for check in checks]
        print_json({"ok": not failed, "checks": found})
    else:
        print_table(("CHECK", "STATUS", "FOUND", "FIX"), checks, no_color=no_color(ctx))
    ctx.exit(EXIT_UNAVAILABLE if failed else 0)

"""``nomad-watchdog doctor``."""

from __future__ import annotations

import asyncio
import os
from dataclasses import asdict

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
    from nomad_watchdog.daemon.doctor.base import Check, Status
    from nomad_watchdog.daemon.doctor.checks import examine

    try:
        settings = settings_of(ctx)
    except UserError as error:
        mend = "see docs/configuration.md"
        checks = [Check("config", Status.FAIL, line, mend) for line in str(error).splitlines()]
    else:
        file = find_file(ctx.obj["config"], os.environ)
        checks = asyncio.run(examine(settings, os.environ, file))
    failed = any(check.status is Status.FAIL for check in checks)
    if output == "json":
        print_json({"ok": not failed, "checks": [asdict(check) for check in checks]})
    else:
        rows = [(check.name, check.status, check.found, check.mend) for check in checks]
        print_table(("CHECK", "STATUS", "FOUND", "FIX"), rows, no_color=no_color(ctx))
    ctx.exit(EXIT_UNAVAILABLE if failed else 0)

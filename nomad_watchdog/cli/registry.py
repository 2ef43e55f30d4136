"""``registry``: back up the registry to a file, and restore it."""

from __future__ import annotations

import asyncio
from typing import TextIO

import click

from nomad_watchdog.cli._options import output_option, settings_of
from nomad_watchdog.daemon import one_shot


@click.group()
def registry() -> None:
    """Back up and restore the registry."""


@registry.command("export")
@click.pass_context
def export(ctx: click.Context) -> None:
    """Print the whole registry: every record with its epoch, including those of devices that have left."""
    for line in asyncio.run(one_shot.export_registry(settings_of(ctx))):
        click.echo(line)


@registry.command("import")
@click.argument("file", type=click.File("r", encoding="utf-8"))
@click.option("--dry-run", is_flag=True, help="Show what would change, and change nothing.")
@output_option("table", "json")
@click.pass_context
def import_(ctx: click.Context, file: TextIO, dry_run: bool, output: str) -> None:
    """Restore a backup into the registry: FILE, or "-" for standard input. The whole backup is checked first.

    Newer records in the registry are kept, and restoring never lowers an epoch. A new registry takes over the
    installation ID of the backup, and with it the running agents."""
    from nomad_watchdog.registry import backup
    from nomad_watchdog.terminal import print_json

    installation, records, floor = backup.parse(file)
    done = asyncio.run(
        one_shot.import_registry(settings_of(ctx), installation, records, floor, dry_run=dry_run)
    )
    if output == "json":
        print_json(
            {
                "installation": done.installation,
                "records": done.records,
                "changed": done.changed,
                "floor_rebuilt": done.rebuilt,
            }
        )
        return
    would = "would be changed" if dry_run else "changed"
    click.echo(f"{done.records} records in the backup, {done.changed} {would}")
    if done.rebuilt:
        click.echo(
            f"The document epoch-floor can't be read and {'would be' if dry_run else 'was'} rewritten, "
            "above every epoch."
        )

"""``run``, ``init`` and ``demo``."""

from __future__ import annotations

import asyncio

import click

from nomad_watchdog.commands._shared import output_option, settings_of


@click.command()
@click.pass_context
def run(ctx: click.Context) -> None:
    """Run the control plane until SIGTERM or SIGINT: API, planner, reconciler."""
    from nomad_watchdog import app

    ctx.exit(asyncio.run(app.serve(settings_of(ctx))))


@click.command()
@click.pass_context
def init(ctx: click.Context) -> None:
    """Prepare a new, empty registry. Doing it again changes nothing.

    Without it nothing is decided: an empty store is taken for a wiped or a wrong one, and an empty
    registry would mean «stop every agent»."""
    from nomad_watchdog import app

    click.echo(asyncio.run(app.initialise(settings_of(ctx))))


@click.command()
@click.option("--devices", type=click.IntRange(10, 200), default=20, show_default=True)
@output_option("table", "json")
@click.pass_context
def demo(ctx: click.Context, devices: int, output: str) -> None:
    """Try it on this machine: made-up devices, an outage, a repair. Leaves nothing behind."""
    from nomad_watchdog import demo as show

    ctx.exit(show.main(backend=ctx.obj["backend"] or "local", devices=devices, output=output))

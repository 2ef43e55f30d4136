"""``run``, ``init`` and ``demo``."""

from __future__ import annotations

import asyncio
import signal

import click

from nomad_watchdog.cli._options import output_option, settings_of
from nomad_watchdog.daemon import one_shot


@click.command()
@click.pass_context
def run(ctx: click.Context) -> None:
    """Run the control plane until SIGTERM or SIGINT.

    SIGHUP reloads the configuration and applies what can be applied at run time."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the service has its own handler
    from nomad_watchdog.daemon import serve

    ctx.exit(asyncio.run(serve.serve(settings_of(ctx), lambda: settings_of(ctx))))


@click.command()
@click.pass_context
def init(ctx: click.Context) -> None:
    """Prepare a new, empty registry. Idempotent.

    The control plane does not start on a store that was not initialised: it could be a wiped or wrong one, and
    an empty registry would stop every agent."""
    click.echo(asyncio.run(one_shot.initialise(settings_of(ctx))))


@click.command()
@click.option("--devices", type=click.IntRange(10, 200), default=20, show_default=True)
@click.option("--keep", is_flag=True, help="Keep everything running until Ctrl-C.")
@output_option("table", "json")
@click.pass_context
def demo(ctx: click.Context, devices: int, keep: bool, output: str) -> None:
    """Run a demo on this machine with simulated devices and faults.

    Uses Nomad and Consul if both are on PATH or were built before, else local processes; --backend takes
    precedence. Exits 0 only if every step converged. Removes everything at the end."""
    from nomad_watchdog import demo as show

    ctx.exit(
        show.main(ctx.obj["backend"], devices, output, keep=keep, no_color=ctx.obj["no_color"])
    )

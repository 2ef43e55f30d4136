"""``stops``: what the mass-change breaker of the running service holds, and the word to let it go."""

from __future__ import annotations

import click

from nomad_watchdog.commands._shared import api_of, no_color, output_option
from nomad_watchdog.render import clean, print_json, print_table


@click.group()
def stops() -> None:
    """Show or confirm the stops that are held because they are too many at once (S7)."""


@stops.command("ls")
@output_option("table", "json")
@click.pass_context
def list_stops(ctx: click.Context, output: str) -> None:
    """List the stops that are held, and the id that confirms them."""
    held = api_of(ctx).get("/v1/plan")["held"]
    if output == "json":
        print_json(held)
        return
    columns = ("device", "epoch", "placement")
    rows = [[stop.get(name) for name in columns] for stop in held["stops"]]
    if rows:
        print_table([name.upper() for name in columns], rows, no_color=no_color(ctx))
    if not held["count"]:
        click.echo("no stops are held")
        return
    click.echo(f"{clean(held['count'])} held: {clean(held['reason'])}")
    click.echo(f"if they are meant: nomad-watchdog stops confirm {clean(held['id'])}")


@stops.command()
@click.argument("held_id", metavar="ID")
@click.pass_context
def confirm(ctx: click.Context, held_id: str) -> None:
    """Let the held stops go that ID names, as `stops ls` and `status` show it.

    Exits 75 when others are held by now."""
    done = api_of(ctx).post("/v1/plan:confirm", {"id": held_id})
    click.echo(f"{clean(done['confirmed'])} stops confirmed")

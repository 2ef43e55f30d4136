"""``stops``: what the mass-change breakers of the running replicas hold, and the word to let it go."""

from __future__ import annotations

from typing import Final

import click

from nomad_watchdog.cli._confirm import Kind
from nomad_watchdog.cli._options import api_of, no_color, output_option

STOPS: Final = Kind(
    word="stops",
    read=lambda api: dict(api.get("/v1/plan")["held"]),
    rows="stops",
    columns=("device", "epoch", "placement"),
    confirm_path="/v1/plan:confirm",
)


@click.group()
def stops() -> None:
    """Show or confirm the stops that are held because they are too many at once (S7)."""


@stops.command("ls")
@output_option("table", "json")
@click.pass_context
def list_stops(ctx: click.Context, output: str) -> None:
    """List the stops that are held, and the id that confirms them; with several replicas, an id each."""
    STOPS.show(api_of(ctx), output, no_color=no_color(ctx))


@stops.command()
@click.argument("held_id", metavar="ID")
@click.pass_context
def confirm(ctx: click.Context, held_id: str) -> None:
    """Let the held stops go that ID names, as `stops ls` and `status` show it.

    Exits 75 when others are held by now."""
    STOPS.confirm(api_of(ctx), held_id)

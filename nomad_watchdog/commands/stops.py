"""``stops``: what the mass-change breakers of the running replicas hold, and the word to let it go."""

from __future__ import annotations

from typing import Any

import click

from nomad_watchdog.commands._api import Api
from nomad_watchdog.commands._shared import api_of, no_color, output_option
from nomad_watchdog.render import clean, print_json, print_table


@click.group()
def stops() -> None:
    """Show or confirm the stops that are held because they are too many at once (S7)."""


def _held(api: Api) -> list[tuple[Api, dict[str, Any]]]:
    """What each replica holds; at least one entry, and those that hold nothing only if none does."""
    found = [(holder, holder.get("/v1/plan")["held"]) for holder in api.holders()]
    return [one for one in found if one[1]["count"]] or found[:1]


@stops.command("ls")
@output_option("table", "json")
@click.pass_context
def list_stops(ctx: click.Context, output: str) -> None:
    """List the stops that are held, and the id that confirms them; with several replicas, an id each."""
    found = [held for _, held in _held(api_of(ctx))]
    if output == "json":
        print_json(found[0] if len(found) == 1 else _together(found))
        return
    columns = ("device", "epoch", "placement")
    rows = [[stop.get(name) for name in columns] for held in found for stop in held["stops"]]
    if rows:
        print_table([name.upper() for name in columns], rows, no_color=no_color(ctx))
    if not any(held["count"] for held in found):
        click.echo("no stops are held")
        return
    for held in found:
        click.echo(f"{clean(held['count'])} held: {clean(held['reason'])}")
        click.echo(f"if they are meant: nomad-watchdog stops confirm {clean(held['id'])}")


def _together(found: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "count": sum(held["count"] for held in found),
        "reason": "; ".join(held["reason"] for held in found),
        "id": "",
        "stops": [stop for held in found for stop in held["stops"]],
        "held": found,
    }


@stops.command()
@click.argument("held_id", metavar="ID")
@click.pass_context
def confirm(ctx: click.Context, held_id: str) -> None:
    """Let the held stops go that ID names, as `stops ls` and `status` show it.

    Exits 75 when others are held by now."""
    found = _held(api_of(ctx))
    holder = next((api for api, held in found if held["id"] == held_id), found[0][0])
    done = holder.post("/v1/plan:confirm", {"id": held_id})
    click.echo(f"{clean(done['confirmed'])} stops confirmed")

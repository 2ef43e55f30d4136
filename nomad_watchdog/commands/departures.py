"""``departures``: devices that the running replicas hold from leaving, and the word to let them go."""

from __future__ import annotations

from typing import Any

import click

from nomad_watchdog.commands._api import Api
from nomad_watchdog.commands._shared import api_of, no_color, output_option
from nomad_watchdog.render import clean, print_json, print_table


@click.group()
def departures() -> None:
    """Show or confirm the devices that are held from leaving because they are too many (S7)."""


def _held(api: Api) -> list[tuple[Api, dict[str, Any]]]:
    """What each replica holds; at least one entry, and those that hold nothing only if none does."""
    found = [(holder, holder.get("/v1/departures")) for holder in api.holders()]
    return [one for one in found if one[1]["count"]] or found[:1]


@departures.command("ls")
@output_option("table", "json")
@click.pass_context
def list_departures(ctx: click.Context, output: str) -> None:
    """List the devices that are held, why, and the id that confirms them; with several replicas, an id
    each."""
    found = [held for _, held in _held(api_of(ctx))]
    if output == "json":
        print_json(found[0] if len(found) == 1 else _together(found))
        return
    rows = [[row["device"], row["cause"]] for held in found for row in held["devices"]]
    if rows:
        print_table(["DEVICE", "CAUSE"], rows, no_color=no_color(ctx))
    if not any(held["count"] for held in found):
        click.echo("no departures are held")
        return
    for held in found:
        click.echo(f"{clean(held['count'])} held: {clean(held['reason'])}")
        click.echo(f"if they are meant: nomad-watchdog departures confirm {clean(held['id'])}")


def _together(found: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "count": sum(held["count"] for held in found),
        "reason": "; ".join(held["reason"] for held in found),
        "id": "",
        "devices": [row for held in found for row in held["devices"]],
        "held": found,
    }


@departures.command()
@click.argument("held_id", metavar="ID")
@click.pass_context
def confirm(ctx: click.Context, held_id: str) -> None:
    """Let those leave that ID names, as `departures ls` and `status` show it.

    Exits 75 when others are held by now."""
    found = _held(api_of(ctx))
    holder = next((api for api, held in found if held["id"] == held_id), found[0][0])
    done = holder.post("/v1/departures:confirm", {"id": held_id})
    click.echo(f"{clean(done['confirmed'])} departures confirmed")

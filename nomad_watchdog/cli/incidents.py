"""``incidents``: problems that many devices share."""

from __future__ import annotations

import click

from nomad_watchdog.cli._answers import Page
from nomad_watchdog.cli._options import api_of, no_color, output_option
from nomad_watchdog.terminal import print_json, print_table
from nomad_watchdog.units import age


@click.command()
@click.option("--open", "only_open", is_flag=True, help="Only open incidents.")
@output_option("table", "json", "wide")
@click.pass_context
def incidents(ctx: click.Context, only_open: bool, output: str) -> None:
    """List open incidents, then the last closed ones."""
    answer = api_of(ctx).get("/v1/incidents", Page, open="true" if only_open else None)
    if output == "json":
        print_json(answer)
        return
    if not answer["items"]:
        click.echo("no incidents")
        return
    heads = ["ID", "GROUP", "NAME", "OPEN", "DEVICES", "NOT WELL", "OF", "SINCE", "REASON"]
    columns = ("id", "kind", "group", "open", "count", "bad", "size")
    rows = []
    for item in answer["items"]:
        row = [*(item.get(name) for name in columns), age(item.get("first_age_s"))]
        row.append(item.get("reason", ""))
        rows.append([*row, item.get("members")] if output == "wide" else row)
    heads += ["MEMBERS"] if output == "wide" else []
    print_table(heads, rows, no_color=no_color(ctx))

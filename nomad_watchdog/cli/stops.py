"""``stops``: stops that the mass-change breakers of the running replicas have put on hold, and their approval."""

from __future__ import annotations

from typing import Final

import click

from nomad_watchdog.cli._answers import Fields, Held, StopPlan
from nomad_watchdog.cli._api_client import ApiClient
from nomad_watchdog.cli._confirm import ConfirmKind
from nomad_watchdog.cli._options import api_of, no_color, output_option


def _read(api: ApiClient) -> tuple[Held, list[Fields]]:
    held = api.get("/v1/plan", StopPlan)["held"]
    return held, held["stops"]


STOPS: Final = ConfirmKind(
    word="stops",
    read=_read,
    rows="stops",
    columns=("device", "epoch", "placement"),
    confirm_path="/v1/plan:confirm",
)


@click.group()
def stops() -> None:
    """List or approve stops that are on hold because too many agents would stop at once."""


@stops.command("ls")
@output_option("table", "json")
@click.pass_context
def list_stops(ctx: click.Context, output: str) -> None:
    """List the stops on hold, and the ID that approves them; each replica has its own ID."""
    STOPS.show(api_of(ctx), output, no_color=no_color(ctx))


@stops.command()
@click.argument("held_id", metavar="ID")
@click.pass_context
def confirm(ctx: click.Context, held_id: str) -> None:
    """Approve the held stops with this ID, as `stops ls` and `status` show it.

    Exits 75 if other stops are on hold by now."""
    STOPS.confirm(api_of(ctx), held_id)

"""``departures``: departures that the running replicas have put on hold, and their approval."""

from __future__ import annotations

from typing import Final

import click

from nomad_watchdog.cli._answers import Fields, Held, HeldDepartures
from nomad_watchdog.cli._api_client import ApiClient
from nomad_watchdog.cli._confirm import ConfirmKind
from nomad_watchdog.cli._options import api_of, no_color, output_option


def _read(api: ApiClient) -> tuple[Held, list[Fields]]:
    held = api.get("/v1/departures", HeldDepartures)
    return held, held["devices"]


DEPARTURES: Final = ConfirmKind(
    word="departures",
    read=_read,
    rows="devices",
    columns=("device", "cause"),
    confirm_path="/v1/departures:confirm",
)


@click.group()
def departures() -> None:
    """List or approve departures that are on hold because too many devices would leave at once."""


@departures.command("ls")
@output_option("table", "json")
@click.pass_context
def list_departures(ctx: click.Context, output: str) -> None:
    """List the departures on hold, and the ID that approves them; each replica has its own ID."""
    DEPARTURES.show(api_of(ctx), output, no_color=no_color(ctx))


@departures.command()
@click.argument("held_id", metavar="ID")
@click.pass_context
def confirm(ctx: click.Context, held_id: str) -> None:
    """Approve the held departures with this ID, as `departures ls` and `status` show it.

    Exits 75 if other departures are on hold by now."""
    DEPARTURES.confirm(api_of(ctx), held_id)

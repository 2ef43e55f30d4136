"""What the running replicas have put on hold, and its approval: the same for stops and departures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import click

from nomad_watchdog.cli._answers import Confirmed, Fields, Held
from nomad_watchdog.cli._api_client import ApiClient
from nomad_watchdog.terminal import clean, print_json, print_table


@dataclass(frozen=True, slots=True)
class ConfirmKind:
    """What can be on hold: stops or departures. `read` returns what one replica has on hold, with its rows."""

    word: str
    """The command's name, in the plural."""
    read: Callable[[ApiClient], tuple[Held, list[Fields]]]
    rows: str
    """Key of the rows in JSON."""
    columns: Sequence[str]
    confirm_path: str

    def held(self, api: ApiClient) -> list[tuple[ApiClient, Held, list[Fields]]]:
        """Each replica with what it has on hold; those with nothing on hold only if no replica has any."""
        found = [(holder, *self.read(holder)) for holder in api.holders()]
        return [one for one in found if one[1]["count"]] or found[:1]

    def show(self, api: ApiClient, output: str, *, no_color: bool) -> None:
        """Print it; with several replicas, an ID each."""
        found = [(held, rows) for _, held, rows in self.held(api)]
        if output == "json":
            print_json(self._as_json(found))
            return
        table = [[row.get(name) for name in self.columns] for _, rows in found for row in rows]
        if table:
            print_table([name.upper() for name in self.columns], table, no_color=no_color)
        if not any(held["count"] for held, _ in found):
            click.echo(f"no {self.word} are on hold")
            return
        for held, _ in found:
            click.echo(f"{clean(held['count'])} on hold: {clean(held['reason'])}")
            click.echo(f"to approve: nomad-watchdog {self.word} confirm {clean(held['id'])}")

    def _as_json(self, found: list[tuple[Held, list[Fields]]]) -> Fields:
        if len(found) == 1:
            return dict(found[0][0])
        return {
            "count": sum(held["count"] for held, _ in found),
            "reason": "; ".join(held["reason"] for held, _ in found),
            "id": "",
            self.rows: [row for _, rows in found for row in rows],
            "held": [held for held, _ in found],
        }

    def confirm(self, api: ApiClient, held_id: str) -> None:
        """Send the approval to the replica that has this ID. Raises ConflictError when others are on hold."""
        found = self.held(api)
        holder = next((one for one, held, _ in found if held["id"] == held_id), found[0][0])
        done = holder.post(self.confirm_path, {"id": held_id}, Confirmed)
        click.echo(f"{done['confirmed']} {self.word} confirmed")

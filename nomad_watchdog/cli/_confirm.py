"""What breakers of the running replicas hold, and the word to let it go: the same for stops and departures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click

from nomad_watchdog.cli._api_client import ApiClient
from nomad_watchdog.terminal import clean, print_json, print_table


@dataclass(frozen=True, slots=True)
class Kind:
    """One thing that is held. `read` gives what one replica holds: count, reason, id and the rows."""

    word: str
    """The verb's name, in the plural."""
    read: Callable[[ApiClient], dict[str, Any]]
    rows: str
    """Key of the rows."""
    columns: Sequence[str]
    confirm_path: str

    def held(self, api: ApiClient) -> list[tuple[ApiClient, dict[str, Any]]]:
        """What each replica holds; at least one entry, and those that hold nothing only if none does."""
        found = [(holder, self.read(holder)) for holder in api.holders()]
        return [one for one in found if one[1]["count"]] or found[:1]

    def show(self, api: ApiClient, output: str, *, no_color: bool) -> None:
        """Print it; with several replicas, an id each."""
        found = [held for _, held in self.held(api)]
        if output == "json":
            print_json(found[0] if len(found) == 1 else self._together(found))
            return
        rows = [
            [row.get(name) for name in self.columns] for held in found for row in held[self.rows]
        ]
        if rows:
            print_table([name.upper() for name in self.columns], rows, no_color=no_color)
        if not any(held["count"] for held in found):
            click.echo(f"no {self.word} are held")
            return
        for held in found:
            click.echo(f"{clean(held['count'])} held: {clean(held['reason'])}")
            click.echo(f"if they are meant: nomad-watchdog {self.word} confirm {clean(held['id'])}")

    def _together(self, found: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "count": sum(held["count"] for held in found),
            "reason": "; ".join(held["reason"] for held in found),
            "id": "",
            self.rows: [row for held in found for row in held[self.rows]],
            "held": found,
        }

    def confirm(self, api: ApiClient, held_id: str) -> None:
        """Send the word to the replica that the id names. Raises ConflictError when others are held."""
        found = self.held(api)
        holder = next((one for one, held in found if held["id"] == held_id), found[0][0])
        done = holder.post(self.confirm_path, {"id": held_id})
        click.echo(f"{clean(done['confirmed'])} {self.word} confirmed")

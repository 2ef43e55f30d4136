"""Values to a terminal: tables for people, JSON for programs. rich is imported for a table only."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import click

COLOURS: Final[Mapping[str, str]] = {
    "watched": "green",
    "ok": "green",
    "running": "green",
    "starting": "cyan",
    "suspect": "yellow",
    "degraded": "yellow",
    "repairing": "yellow",
    "warn": "yellow",
    "unwatched": "magenta",
    "offline": "red",
    "failing": "red",
    "fail": "red",
    "lost": "red",
}


def clean(value: object) -> str:
    """Text that can't move a cursor, reorder a line or forge one (S11): each unprintable character
    (controls, bidirectional marks, lone surrogates) is shown as its Python escape."""
    text = "" if value is None else str(value)
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode("ascii")
        for c in text
    )


def cell(value: object) -> str:
    """One value of a table: mappings as k=v, floats short, nothing for None."""
    if isinstance(value, Mapping):
        return clean(",".join(f"{key}={item}" for key, item in sorted(value.items())))
    if isinstance(value, list | tuple):
        return clean(",".join(str(item) for item in value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return clean(value)


def print_json(value: object) -> None:
    """ASCII only, so that nothing in it can reach the terminal as a control sequence."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=True, default=str))


def print_table(
    headers: Sequence[str], rows: Iterable[Sequence[Any]], *, no_color: bool = False
) -> None:
    """A borderless table on stdout. Piped, lines are as long as they need to be."""
    from rich.console import Console  # noqa: PLC0415  # 60 ms that `-o json` and --help need not pay
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    tty = sys.stdout.isatty()
    console = Console(
        file=sys.stdout,
        width=None if tty else 4096,
        no_color=no_color or not tty,
        highlight=False,
        markup=False,
        emoji=False,
    )
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for header in headers:
        table.add_column(Text(header), overflow="fold", no_wrap=not tty)
    for row in rows:
        texts = [cell(value) for value in row]
        table.add_row(*(Text(text, style=COLOURS.get(text, "")) for text in texts))
    console.print(table)

"""``hosts``: the hosts of the agents, with their pressure."""

from __future__ import annotations

from typing import Final

import click

from nomad_watchdog.cli._answers import HostAnswer, HostsAnswer, StallAnswer
from nomad_watchdog.cli._options import api_of, no_color, output_option
from nomad_watchdog.terminal import print_json, print_table
from nomad_watchdog.units import age

UNKNOWN: Final = "unknown"
_RESOURCES: Final = ("cpu", "memory", "io")


@click.group()
def hosts() -> None:
    """List the hosts of the agents."""


@hosts.command("ls")
@output_option("table", "json")
@click.pass_context
def list_hosts(ctx: click.Context, output: str) -> None:
    """List hosts with their agents, their state and their pressure.

    Pressure is the share of the last 10 and 60 seconds in which a task of the host waited for the resource. Where it
    can't be read, "used" is the share of the capacity by the scheduler's statistics."""
    answer = api_of(ctx).get("/v1/hosts", HostsAnswer)
    if output == "json":
        print_json(answer)
        return
    heads = ["HOST", "AGENTS", "STATE", *(name.upper() for name in _RESOURCES), "READ", "PROBLEM"]
    items = answer["items"]
    print_table(heads if items else ["no hosts"], map(_row, items), no_color=no_color(ctx))


def _row(item: HostAnswer) -> list[object]:
    stalls, usage = item["pressure"] or {}, item.get("usage") or {}
    return [
        item["host"],
        item["agents"],
        item["state"],
        *(_stall(stalls.get(name), usage.get(name)) for name in _RESOURCES),
        "" if item["age_s"] is None else f"{age(item['age_s'])} ago",
        item["unreadable"],
    ]


def _stall(stall: StallAnswer | None, used: float | None) -> str:
    if stall is None:
        return UNKNOWN if used is None else f"{used:.1f}% used"
    return f"{stall['avg10']:.1f}% {stall['avg60']:.1f}%"

"""``status``, ``explain``, ``leader`` and ``events``: commands that only read."""

from __future__ import annotations

import json
import random
import shutil
import sys
import threading
from collections.abc import Iterable, Mapping

import click
from watchdog_agent.runtime.parsing import whole

from nomad_watchdog.cli import _complete, _summary
from nomad_watchdog.cli._answers import (
    ConfiguredReplica,
    EventPage,
    Fields,
    KnownLease,
    LeasesAnswer,
    NextPage,
)
from nomad_watchdog.cli._api_client import PAGE, ApiClient, device_path
from nomad_watchdog.cli._event_line import event_line
from nomad_watchdog.cli._fields import leaf, mapping, rollout_line
from nomad_watchdog.cli._options import api_of, no_color, output_option
from nomad_watchdog.clock import SystemClock
from nomad_watchdog.errors import TerminalError, TransientError, UserError
from nomad_watchdog.terminal import cell, clean, print_json, print_table
from nomad_watchdog.units import age

_EXPLAINED = frozenset({"id", "verdict", "since_s", "reason", "next", "next_in_s"})
"""Fields that the first lines of `explain` show."""


@click.command()
@output_option()
@click.pass_context
def status(ctx: click.Context, output: str) -> None:
    """Show the state of the fleet on one screen. -o wide shows all fields."""
    api = api_of(ctx)
    answer = api.get("/v1/status")
    if output == "json":
        print_json(answer)
    elif output == "wide":
        found = mapping(answer.pop("rollouts", None))
        _print_tree(answer)
        if found:
            click.echo("rollouts:")
        for one in found.values():
            click.echo(clean(f"  {rollout_line(mapping(one))}"))
    else:
        counts = _summary.counted(answer)
        lines = _summary.status_lines(answer)
        _print_cut([*lines, *_summary.device_lines(_worst(api, counts), counts)])


def _worst(api: ApiClient, counts: list[tuple[str, int]]) -> list[Fields]:
    """Devices with a problem, the worst verdicts first, at most MAX_DEVICES."""
    found: list[Fields] = []
    for verdict, _ in counts:
        if free := _summary.MAX_DEVICES - len(found):
            found += api.get("/v1/devices", NextPage, verdict=verdict, limit=free)["items"]
    return found


def _print_cut(lines: Iterable[str]) -> None:
    """One line of the terminal each; piped, as long as they are."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for line in lines:
        cut = width is not None and len(line) > width
        click.echo(f"{line[: max(0, (width or 0) - 4)]} ..." if cut else line)


@click.command()
@click.argument("device_id", metavar="DEVICE", shell_complete=_complete.devices)
@output_option("table", "json")
@click.pass_context
def explain(ctx: click.Context, device_id: str, output: str) -> None:
    """Explain the state of a device: its verdict, the evidence, the last decisions."""
    answer = api_of(ctx).get(device_path(device_id, "explain"))
    if output == "json":
        print_json(answer)
        return
    for line in _summary.explained(answer):
        click.echo(line)
    last = answer.pop("events", [])
    click.echo("last events:")
    for event in last if isinstance(last, list) else []:
        click.echo(f"  {event_line(mapping(event))}")
    _print_tree({name: answer[name] for name in answer if name not in _EXPLAINED})


@click.command()
@output_option("table", "json")
@click.pass_context
def leader(ctx: click.Context, output: str) -> None:
    """Show which replica holds each shard, and since when."""
    answer = api_of(ctx).get("/v1/leases", LeasesAnswer)
    if output == "json":
        print_json(answer)
        return
    now = SystemClock().wall()
    rows = [
        [one["shard"], _holder(one), one["api"], _held_for(one, now), one["term"]]
        for one in answer["shards"]
    ]
    print_table(["SHARD", "HOLDER", "API", "SINCE", "TERM"], rows, no_color=no_color(ctx))
    for line in _differing(answer["replicas"]):
        click.echo(line, err=True)
    if answer["problem"]:
        holds = any(one["holder"] == answer["replica"] for one in answer["shards"])
        state = "" if holds else " holds nothing"
        click.echo(f"{clean(answer['replica'])}{state}: {clean(answer['problem'])}", err=True)


def _differing(replicas: list[ConfiguredReplica]) -> list[str]:
    """A line per replica, if their configurations differ."""
    configs = {one["id"]: config for one in replicas if (config := one.get("config"))}
    if len(set(configs.values())) < 2:
        return []
    lines = [
        f"{clean(name)} is configured with {clean(config)}" for name, config in configs.items()
    ]
    return ["replicas are configured differently; see `status` for the classes:", *lines]


def _holder(lease: KnownLease) -> str:
    if lease["holder"]:
        return lease["holder"]
    last = lease.get("last_known")
    return f"unknown; last known: {last}" if last else "none"


def _held_for(lease: KnownLease, now: float) -> str:
    return age(max(0.0, now - lease["since"])) if lease["holder"] else ""


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Keep printing new events until interrupted.")
@click.option(
    "--since",
    default="0",
    metavar="N|AGE",
    help="Only events after this number, or newer than 90s, 1h, 2d.",
)
@click.option(
    "--device",
    metavar="ID",
    shell_complete=_complete.devices,
    help="Only events about this device.",
)
@click.option(
    "--kind",
    metavar="START",
    shell_complete=_complete.kinds,
    help="Only kinds with this prefix, such as verdict.",
)
@click.option(
    "--verdict",
    metavar="STATE",
    shell_complete=_complete.verdicts,
    help="Only changes to this verdict.",
)
@click.option(
    "--own", is_flag=True, help="Only events that the replica at this address observed itself."
)
@output_option()
@click.pass_context
def events(
    ctx: click.Context, /, follow: bool, since: str, own: bool, output: str, **wanted: str | None
) -> None:
    """Print events, oldest first, with local times. -o wide shows their kinds, -o json all fields. With -f, continue
    with new events, and reconnect if the stream breaks."""
    api = api_of(ctx)
    after, within_s = _since(since)
    filters: dict[str, object] = {**wanted, "within_s": within_s, "own": "true" if own else None}
    if follow:
        _follow(api, after, output, filters)
        return
    while True:
        page = api.get("/v1/events", EventPage, since=after, limit=PAGE, **filters)
        for event in page["items"]:
            _print_event(event, output)
        if len(page["items"]) < PAGE or page["next"] <= after:
            return
        after = page["next"]


def _since(text: str) -> tuple[int, int | None]:
    """A sequence number and no age, or 0 and an age in seconds. Raises UserError."""
    if text.isascii() and text.isdigit():
        try:
            return whole(text), None
        except ValueError as error:
            raise UserError(f"--since: {error}") from None
    from nomad_watchdog.units import parse_duration

    try:
        return 0, max(1, round(float(str(parse_duration(text)))))
    except ValueError as error:
        raise UserError(f"--since: {error}; or the number of an event") from error


def _follow(api: ApiClient, since: int, output: str, filters: Mapping[str, object]) -> None:
    never, failures, connected = threading.Event(), 0, False
    while True:
        try:
            for event in api.lines("/v1/events", since=since, follow="true", **filters):
                since, failures, connected = max(since, _sequence(event)), 0, True
                _print_event(event, output)
        except (TransientError, TerminalError) as error:
            # The first connection failed: the address is wrong, so there is no point in trying again.
            if not connected and isinstance(error, TerminalError):
                raise
            click.echo(f"{clean(error)}; reconnecting", err=True)
        failures = min(failures + 1, 5)
        never.wait(random.uniform(0.1, min(0.5 * 2**failures, 10.0)))  # noqa: S311  # jitter


def _sequence(event: Fields) -> int:
    found = event.get("seq", 0)
    return found if isinstance(found, int) else 0


def _print_event(event: Fields, output: str) -> None:
    if output == "json":
        click.echo(json.dumps(event, ensure_ascii=True))
    else:
        click.echo(event_line(event, with_kind=output == "wide"))


def _print_tree(value: object, depth: int = 0) -> None:
    """A JSON object as indented lines; every leaf is escaped."""
    pad = "  " * depth
    if isinstance(value, dict):
        for key, item in value.items():
            if isinstance(item, dict | list) and item:
                click.echo(f"{pad}{clean(key)}:")
                _print_tree(item, depth + 1)
            else:
                name, text = leaf(key, item)
                click.echo(f"{pad}{clean(name)}: {text or '-'}")
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, dict):
                leaves = (leaf(key, inner) for key, inner in item.items())
                click.echo(f"{pad}" + "  ".join(f"{clean(k)}={v}" for k, v in leaves if v))
            else:
                click.echo(f"{pad}{cell(item)}")
    else:
        click.echo(f"{pad}{cell(value)}")

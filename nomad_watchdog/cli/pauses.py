"""``pause``, ``resume`` and ``maintenance``: take no action for devices for a time."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from functools import wraps

import click

from nomad_watchdog.cli import _complete
from nomad_watchdog.cli._answers import Fields, PauseAnswer, PausesAnswer, PauseTarget
from nomad_watchdog.cli._api_client import quoted
from nomad_watchdog.cli._options import api_of, caller, no_color, output_option
from nomad_watchdog.errors import UserError
from nomad_watchdog.labels import parse_labels
from nomad_watchdog.terminal import clean, print_json, print_table

Command = Callable[..., object]


def _of_devices(command: Command) -> Command:
    """DEVICE…, --class and --selector, as the one argument `target`."""

    @wraps(command)
    def inner(
        *args: object,
        device_ids: tuple[str, ...],
        agent_class: str | None,
        labels: tuple[str, ...],
        **rest: object,
    ) -> object:
        if not (device_ids or agent_class or labels):
            raise UserError("name devices, --class or --selector")
        target: Fields = {"devices": list(device_ids), "labels": parse_labels(labels)}
        target |= {"class": agent_class} if agent_class else {}
        return command(*args, target=target, **rest)

    return _with(
        inner,
        click.argument(
            "device_ids", metavar="[DEVICE]...", nargs=-1, shell_complete=_complete.devices
        ),
        click.option(
            "--class",
            "agent_class",
            shell_complete=_complete.agent_classes,
            help="All devices of this agent class.",
        ),
        click.option(
            "--selector",
            "labels",
            multiple=True,
            metavar="KEY=VALUE",
            help="Devices with this label; may be repeated, all must match.",
        ),
    )


def _with_an_end(command: Command) -> Command:
    """--for, --until and --reason, as the one argument `how`."""

    @wraps(command)
    def inner(
        *args: object, lasts: str | None, until: str | None, reason: str, **rest: object
    ) -> object:
        how: Fields = {"reason": reason, "by": caller()}
        how |= {"for": lasts} if lasts else {}
        how |= {"until": _time(until, "--until")} if until else {}
        return command(*args, how=how, **rest)

    return _with(
        inner,
        click.option("--for", "lasts", metavar="DURATION", help='Duration, such as "2h" or "30m".'),
        click.option(
            "--until",
            metavar="TIME",
            help="End time: 2026-01-31T22:00, in the given or the local time zone.",
        ),
        click.option("--reason", default="", help="Reason; shown by `explain`."),
    )


def _with(command: Command, *options: Callable[[Command], Command]) -> Command:
    for option in options:
        command = option(command)
    return command


def _time(text: str | None, option: str) -> str | None:
    """As RFC 3339; a time without a zone is this machine's."""
    if text is None:
        return None
    try:
        return datetime.fromisoformat(text).astimezone().isoformat()
    except (ValueError, OverflowError) as error:
        raise UserError(
            f"{option} {text!a} is not a time; write 2026-01-31T22:00 or 2026-01-31T22:00:00Z"
        ) from error


@click.command()
@_of_devices
@_with_an_end
@output_option("table", "json")
@click.pass_context
def pause(ctx: click.Context, target: Fields, how: Fields, output: str) -> None:
    """Pause all actions for devices, until `resume` or for a time: no start, stop or replacement.

    A device must match all conditions. Pausing the same devices again changes the end."""
    _print_pause(api_of(ctx).post("/v1/pauses", target | how, PauseAnswer), output)


@click.command()
@_of_devices
@click.pass_context
def resume(ctx: click.Context, target: Fields) -> None:
    """End the pause of exactly these devices, class or selector. Devices of a list can be resumed one by one."""
    api_of(ctx).post("/v1/pauses:resume", target)
    click.echo("resumed")


@click.group()
def maintenance() -> None:
    """Manage maintenance windows: times in which no action is taken for devices."""


@maintenance.command()
@_of_devices
@_with_an_end
@click.option("--from", "begins", metavar="TIME", help="Start time [default: now].")
@output_option("table", "json")
@click.pass_context
def add(
    ctx: click.Context,
    target: Fields,
    how: Fields,
    begins: str | None,
    output: str,
) -> None:
    """Add a maintenance window. Requires --for or --until."""
    body = target | how | {"window": True}
    body |= {"from": _time(begins, "--from")} if begins else {}
    _print_pause(api_of(ctx).post("/v1/pauses", body, PauseAnswer), output)


@maintenance.command("ls")
@output_option("table", "json")
@click.pass_context
def list_windows(ctx: click.Context, output: str) -> None:
    """List current and future windows and pauses."""
    answer = api_of(ctx).get("/v1/pauses", PausesAnswer)
    if output == "json":
        print_json(answer)
        return
    rows = [
        [
            item["id"],
            "window" if item["window"] else "pause",
            "yes" if item["active"] else "not yet",
            _of(item),
            item["covers"],
            _time_text(item["begins"]),
            _time_text(item["ends"]),
            item["by"],
            item["reason"],
        ]
        for item in answer["items"]
    ]
    heads = ["ID", "KIND", "ACTIVE", "OF", "DEVICES", "FROM", "UNTIL", "BY", "REASON"]
    print_table(heads if rows else ["nothing is paused"], rows, no_color=no_color(ctx))


@maintenance.command()
@click.argument("pause_id", metavar="ID")
@click.pass_context
def rm(ctx: click.Context, pause_id: str) -> None:
    """End a window or pause by its ID."""
    api_of(ctx).delete(f"/v1/pauses/{quoted(pause_id)}")
    click.echo(f"{clean(pause_id)}: removed")


def _of(item: PauseTarget) -> str:
    parts = [f"class {item['class']}"] if item["class"] else []
    parts += [f"{key}={value}" for key, value in sorted(item["labels"].items())]
    return ", ".join([*item["devices"][:5], *(["…"] if len(item["devices"]) > 5 else []), *parts])


def _time_text(at: float | None) -> str:
    if at is None:
        return "resumed"
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _print_pause(answer: PauseAnswer, output: str) -> None:
    if not answer["covers"]:
        click.echo(
            "warning: no registered device matches; only devices that are registered later are covered",
            err=True,
        )
    if output == "json":
        print_json(answer)
        return
    end = _time_text(answer["ends"]) if answer["ends"] is not None else "it is resumed"
    click.echo(
        f"{clean(answer['id'])}: {clean(answer['covers'])} device{'s' * (answer['covers'] != 1)}, from "
        f"{_time_text(answer['begins'])} until {end}"
    )

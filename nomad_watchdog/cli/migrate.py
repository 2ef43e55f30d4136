"""``migrate``: move a running fleet from one scheduler to another."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Final, TypedDict, Unpack

import click

from nomad_watchdog.cli import _complete
from nomad_watchdog.cli._answers import (
    Fields,
    MigrationAnswer,
    MigrationBegun,
    MigrationsAnswer,
    MigrationState,
)
from nomad_watchdog.cli._options import api_of, caller, no_color, output_option, refuse_options
from nomad_watchdog.errors import ConflictError, TransientError, UserError
from nomad_watchdog.labels import parse_labels
from nomad_watchdog.terminal import clean, print_json, print_table

POLL_S: Final = 1.0


class _Options(TypedDict):
    """The options of `migrate` itself."""

    devices: tuple[str, ...]
    agent_class: str | None
    labels: tuple[str, ...]
    shards: tuple[int, ...]
    at_once: int | None
    dry_run: bool
    wait: bool
    output: str


@click.group(invoke_without_command=True)
@click.option("--from", "source", metavar="BACKEND", help="Backend that runs the agents now.")
@click.option("--to", "goal", metavar="BACKEND", help="Backend to move them to.")
@click.option(
    "--device",
    "devices",
    metavar="ID",
    multiple=True,
    shell_complete=_complete.devices,
    help="Only this device; may be repeated.",
)
@click.option(
    "--class",
    "agent_class",
    shell_complete=_complete.agent_classes,
    help="Only devices of this agent class.",
)
@click.option(
    "--selector",
    "labels",
    multiple=True,
    metavar="KEY=VALUE",
    help="Only devices with this label; may be repeated, all must match.",
)
@click.option(
    "--shard", "shards", type=int, multiple=True, help="Only this shard; may be repeated."
)
@click.option(
    "--at-once",
    type=click.IntRange(min=1),
    help="Maximum number of moves in progress [default: as in a roll-out].",
)
@click.option("--dry-run", is_flag=True, help="Show what would move, and change nothing.")
@click.option(
    "--wait", is_flag=True, help="Wait until all agents have moved; Ctrl-C ends only the wait."
)
@output_option("table", "json")
@click.pass_context
def migrate(
    ctx: click.Context, /, source: str | None, goal: str | None, **how: Unpack[_Options]
) -> None:
    """Move agents from one scheduler to another, a limited number of devices at a time.

    Without --device, --class, --selector or --shard the whole fleet moves, shard by shard. The configuration of
    every replica must have the block of the new backend."""
    if ctx.invoked_subcommand is not None:
        refuse_options(ctx, "migration")
        return
    if not source or not goal:
        raise UserError(
            "--from and --to are required; `migrate status` shows the migration in progress"
        )
    body: Fields = {
        "from": source,
        "to": goal,
        "devices": list(how["devices"]),
        "labels": parse_labels(how["labels"]),
        "shards": list(how["shards"]),
        "dry_run": how["dry_run"],
        "by": caller(),
    }
    body |= {"class": how["agent_class"]} if how["agent_class"] else {}
    body |= {"at_once": how["at_once"]} if how["at_once"] else {}
    answer = api_of(ctx).post("/v1/migration", body, MigrationBegun)
    if how["output"] == "json":
        print_json(answer)
    else:
        _print_begun(answer, dry_run=how["dry_run"])
    if how["wait"] and not how["dry_run"]:
        _wait(ctx, answer["id"])


@migrate.command("status")
@click.option("--wait", is_flag=True, help="Wait until all agents have moved.")
@output_option("table", "json")
@click.pass_context
def show(ctx: click.Context, wait: bool, output: str) -> None:
    """Show the progress of the migration."""
    if wait:
        _wait(ctx)
    answer = api_of(ctx).get("/v1/migration", MigrationsAnswer)
    if output == "json":
        print_json(answer)
        return
    rows = [
        [
            one["from"],
            one["to"],
            one["state"],
            _of(one),
            one["devices"],
            one["there"],
            one["ready"],
            one["waiting"],
            one["ending"],
            one["by"],
        ]
        for one in answer["items"]
    ]
    heads = ["FROM", "TO", "STATE", "OF", "DEVICES", "THERE", "READY", "WAITING", "ENDING", "BY"]
    print_table(heads if rows else ["no migrations"], rows, no_color=no_color(ctx))
    for text in (answer["hint"], answer["problem"]):
        if text:
            click.echo(clean(text), err=True)


@migrate.command()
@output_option("table", "json")
@click.pass_context
def pause(ctx: click.Context, output: str) -> None:
    """Stop starting new moves; moves in progress finish."""
    _change(ctx, "pause", output)


@migrate.command()
@output_option("table", "json")
@click.pass_context
def resume(ctx: click.Context, output: str) -> None:
    """Resume a paused migration."""
    _change(ctx, "resume", output)


@migrate.command()
@output_option("table", "json")
@click.pass_context
def undo(ctx: click.Context, output: str) -> None:
    """Move the agents back, within the same limits; also after the migration has ended."""
    _change(ctx, "undo", output)


def _change(ctx: click.Context, what: str, output: str) -> None:
    answer = api_of(ctx).post(f"/v1/migration:{what}", {}, MigrationState)
    if output == "json":
        print_json(answer)
    else:
        click.echo(f"{clean(answer['from'])} to {clean(answer['to'])}: {clean(answer['state'])}")


def _of(one: MigrationAnswer) -> str:
    target = one["target"]
    parts = [f"class {target['class']}"] if target["class"] else []
    parts += [f"{key}={value}" for key, value in sorted(target["labels"].items())]
    parts += [f"shard {number}" for number in one["shards"]]
    names = [*target["devices"][:5], *(["…"] if len(target["devices"]) > 5 else []), *parts]
    return ", ".join(names) or "all"


def _print_begun(answer: MigrationBegun, *, dry_run: bool) -> None:
    would = "would move" if dry_run else "move"
    click.echo(
        f"{clean(answer['to_move'])} of {clean(answer['devices'])} devices {would} from "
        f"{clean(answer['from'])} to {clean(answer['to'])}"
    )
    if dry_run:
        for title, counts in (
            ("class", answer.get("by_class", {})),
            ("shard", answer.get("by_shard", {})),
        ):
            for name, count in counts.items():
                click.echo(f"  {title} {clean(name)}: {clean(count)}")


def _wait(ctx: click.Context, begun: str = "") -> None:
    """Wait until the migration `begun` is done ("" = until none is in progress), and print its progress. Waits
    also while the API does not answer.

    Raises ConflictError when the migration is undone or replaced meanwhile."""
    printed = ""
    expected = {begun} if begun else None
    """The migrations that move devices to their goal; None = not known yet."""
    while True:
        try:
            answer = api_of(ctx).get("/v1/migration", MigrationsAnswer)
        except TransientError:
            time.sleep(POLL_S)  # noqa: TID251  # a command that waits
            continue
        items = {one["id"]: one for one in answer["items"]}
        active = [one for one in items.values() if one["state"] not in ("done", "undone")]
        if expected is None:
            expected = {one["id"] for one in active if not one["back"]}
        _check_expected(expected, items)
        if not active or (begun in items and items[begun]["state"] == "done"):
            return
        for one in active:
            text = f"{one['state']}: {one['ready']} of {one['devices']} ready there"
            if text != printed:
                click.echo(clean(text), err=True)
                printed = text
        time.sleep(POLL_S)  # noqa: TID251  # a command that waits


def _check_expected(expected: Collection[str], items: Mapping[str, MigrationAnswer]) -> None:
    for one in expected:
        if one not in items:
            raise ConflictError(
                "another migration has replaced the one that this command waits for"
            )
        if items[one]["state"] == "undone":
            raise ConflictError(f"the migration to {clean(items[one]['to'])} was undone meanwhile")

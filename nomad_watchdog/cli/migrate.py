"""``migrate``: move a running fleet from one scheduler to another."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Any, Final

import click
from click.core import ParameterSource

from nomad_watchdog.cli._options import api_of, caller, no_color, output_option
from nomad_watchdog.errors import ConflictError, TransientError, UserError
from nomad_watchdog.labels import parse_labels
from nomad_watchdog.terminal import clean, print_json, print_table

POLL_S: Final = 1.0


@click.group(invoke_without_command=True)
@click.option("--from", "source", metavar="BACKEND", help="Backend that runs the agents now.")
@click.option("--to", "goal", metavar="BACKEND", help="Backend to move them to.")
@click.option(
    "--device", "devices", metavar="ID", multiple=True, help="Only this device; may be repeated."
)
@click.option("--class", "agent_class", help="Only devices of this agent class.")
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
def migrate(ctx: click.Context, /, source: str | None, goal: str | None, **how: Any) -> None:
    """Move agents from one scheduler to another, one window of devices after the other.

    Without --device, --class, --selector or --shard the whole fleet moves, shard by shard. The new backend's
    block must be in the configuration of every replica."""
    if ctx.invoked_subcommand is not None:
        _refuse_options(ctx)
        return
    if not source or not goal:
        raise UserError("name both, --from and --to; `migrate status` shows what is under way")
    body: dict[str, Any] = {
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
    answer = api_of(ctx).post("/v1/migration", body)
    if how["output"] == "json":
        print_json(answer)
    else:
        _print_begun(answer, dry_run=how["dry_run"])
    if how["wait"] and not how["dry_run"]:
        _wait(ctx, answer["id"])


def _refuse_options(ctx: click.Context) -> None:
    """What is said of another verb would be done to the whole migration. Raises UserError."""
    given = [
        one.opts[-1]
        for one in ctx.command.params
        if one.name and ctx.get_parameter_source(one.name) is ParameterSource.COMMANDLINE
    ]
    if given:
        verb = ctx.invoked_subcommand
        raise UserError(
            f"migrate {verb} is about the migration that is under way and takes no {' and no '.join(given)}; "
            f"its own options come after {verb}"
        )


@migrate.command("status")
@click.option("--wait", is_flag=True, help="Wait until all agents have moved.")
@output_option("table", "json")
@click.pass_context
def show(ctx: click.Context, wait: bool, output: str) -> None:
    """Show the progress of the migration."""
    if wait:
        _wait(ctx)
    answer = api_of(ctx).get("/v1/migration")
    if output == "json":
        print_json(answer)
        return
    columns = ("devices", "there", "ready", "waiting", "ending", "by")
    rows = [
        [one["from"], one["to"], one["state"], _of(one), *(one[name] for name in columns)]
        for one in answer["items"]
    ]
    heads = ["FROM", "TO", "STATE", "OF", "DEVICES", "THERE", "READY", "WAITING", "ENDING", "BY"]
    print_table(heads if rows else ["nothing was ever moved"], rows, no_color=no_color(ctx))
    for text in (answer["hint"], answer["problem"]):
        if text:
            click.echo(clean(text), err=True)


@migrate.command()
@output_option("table", "json")
@click.pass_context
def pause(ctx: click.Context, output: str) -> None:
    """Stop starting new moves; moves in progress finish."""
    _say(ctx, "pause", output)


@migrate.command()
@output_option("table", "json")
@click.pass_context
def resume(ctx: click.Context, output: str) -> None:
    """Resume a paused migration."""
    _say(ctx, "resume", output)


@migrate.command()
@output_option("table", "json")
@click.pass_context
def undo(ctx: click.Context, output: str) -> None:
    """Move the agents back, within the same limits; also after the migration has ended."""
    _say(ctx, "undo", output)


def _say(ctx: click.Context, what: str, output: str) -> None:
    answer = api_of(ctx).post(f"/v1/migration:{what}", {})
    if output == "json":
        print_json(answer)
    else:
        click.echo(f"{clean(answer['from'])} to {clean(answer['to'])}: {clean(answer['state'])}")


def _of(one: dict[str, Any]) -> str:
    target = one["target"]
    parts = [f"class {target['class']}"] if target["class"] else []
    parts += [f"{key}={value}" for key, value in sorted(target["labels"].items())]
    parts += [f"shard {number}" for number in one["shards"]]
    names = [*target["devices"][:5], *(["…"] if len(target["devices"]) > 5 else []), *parts]
    return ", ".join(names) or "all"


def _print_begun(answer: dict[str, Any], *, dry_run: bool) -> None:
    would = "would move" if dry_run else "move"
    click.echo(
        f"{clean(answer['to_move'])} of {clean(answer['devices'])} devices {would} from "
        f"{clean(answer['from'])} to {clean(answer['to'])}"
    )
    if dry_run:
        for title, counts in (("class", answer["by_class"]), ("shard", answer["by_shard"])):
            for name, count in counts.items():
                click.echo(f"  {title} {clean(name)}: {clean(count)}")


def _wait(ctx: click.Context, begun: str = "") -> None:
    """Until the move `begun` is done ("" = until nothing is under way), saying what changes. An API that is away
    for a while is waited for.

    Raises ConflictError when somebody undoes what is waited for, or puts another in its place."""
    said = ""
    meant = {begun} if begun else None
    """Those that head for their goal; None = not known yet."""
    while True:
        try:
            answer = api_of(ctx).get("/v1/migration")
        except TransientError:
            answer = None
        items = {one["id"]: one for one in (answer or {}).get("items", [])}
        active = [one for one in items.values() if one["state"] not in ("done", "undone")]
        if answer is not None:
            if meant is None:
                meant = {one["id"] for one in active if not one["back"]}
            _check_meant(meant, items)
            if not active or items.get(begun, {}).get("state") == "done":
                return
        for one in active:
            text = f"{one['state']}: {one['ready']} of {one['devices']} ready there"
            if text != said:
                click.echo(clean(text), err=True)
                said = text
        time.sleep(POLL_S)  # noqa: TID251  # a verb that waits


def _check_meant(meant: Collection[str], items: Mapping[str, dict[str, Any]]) -> None:
    for one in meant:
        if one not in items:
            raise ConflictError(
                "another migration has taken the place of the one that was waited for"
            )
        if items[one]["state"] == "undone":
            raise ConflictError(
                f"the migration to {clean(items[one]['to'])} was undone by somebody meanwhile"
            )

"""``rebalance``: move agents from hosts with many agents to hosts with few."""

from __future__ import annotations

import time
from typing import Final

import click

from nomad_watchdog.cli import _complete
from nomad_watchdog.cli._answers import (
    Fields,
    HostCount,
    RebalanceAnswer,
    RebalanceBegun,
    RebalancesAnswer,
    RebalanceStateAnswer,
)
from nomad_watchdog.cli._options import api_of, caller, no_color, output_option, refuse_options
from nomad_watchdog.errors import ConflictError, TransientError
from nomad_watchdog.labels import parse_labels
from nomad_watchdog.terminal import clean, print_json, print_table

POLL_S: Final = 1.0
_OVER: Final = ("done", "ended", "aborted")
_UNSTEERED: Final = (
    "the scheduler of this fleet can't be asked to prefer hosts with few agents, so agents may come back to the hosts "
    "that they leave; the rebalance then ends after a few moves"
)


@click.group(invoke_without_command=True)
@click.option(
    "--class",
    "agent_class",
    shell_complete=_complete.agent_classes,
    help="Move only devices of this agent class.",
)
@click.option(
    "--selector",
    "labels",
    multiple=True,
    metavar="KEY=VALUE",
    help="Move only devices with this label; may be repeated, all must match.",
)
@click.option(
    "--max",
    "most",
    type=click.IntRange(min=1),
    help="Maximum number of devices to move [default: as many as needed].",
)
@click.option("--dry-run", is_flag=True, help="Show what would move, and change nothing.")
@click.option(
    "--wait", is_flag=True, help="Wait until the rebalance is over; Ctrl-C ends only the wait."
)
@output_option("table", "json")
@click.pass_context
def rebalance(  # one parameter per option
    ctx: click.Context,
    /,
    agent_class: str | None,
    labels: tuple[str, ...],
    most: int | None,
    *,
    dry_run: bool,
    wait: bool,
    output: str,
) -> None:
    """Move agents from hosts with many agents to hosts with few, a limited number at a time.

    Afterwards the largest and the smallest number of agents per host differ by at most 10 % of the mean, or by 1. Only
    agents of healthy devices are moved, and each device at most once."""
    if ctx.invoked_subcommand is not None:
        refuse_options(ctx, "rebalance")
        return
    body: Fields = {"labels": parse_labels(labels), "dry_run": dry_run, "by": caller()}
    body |= {"class": agent_class} if agent_class else {}
    body |= {"max": most} if most else {}
    answer = api_of(ctx).post("/v1/rebalance", body, RebalanceBegun)
    if output == "json":
        print_json(answer)
    else:
        _print_begun(ctx, answer, dry_run=dry_run)
    if wait and not dry_run:
        _wait(ctx, answer["id"])


@rebalance.command("status")
@click.option("--wait", is_flag=True, help="Wait until the rebalance is over.")
@output_option("table", "json")
@click.pass_context
def show(ctx: click.Context, wait: bool, output: str) -> None:
    """Show the last rebalance and the number of agents per host."""
    if wait:
        _wait(ctx)
    answer = api_of(ctx).get("/v1/rebalance", RebalancesAnswer)
    if output == "json":
        print_json(answer)
        return
    rows = [
        [
            one["state"],
            _of(one),
            one["moved"],
            one["on_way"],
            one["waiting"],
            one["by"],
            one["reason"],
        ]
        for one in answer["items"]
    ]
    heads = ["STATE", "OF", "MOVED", "ON WAY", "WAITING", "BY", "REASON"]
    print_table(heads if rows else ["no rebalance"], rows, no_color=no_color(ctx))
    _print_hosts(ctx, answer["hosts"])
    if answer["problem"]:
        click.echo(clean(answer["problem"]), err=True)


@rebalance.command()
@output_option("table", "json")
@click.pass_context
def pause(ctx: click.Context, output: str) -> None:
    """Stop starting new moves; moves in progress finish."""
    _change(ctx, "pause", output)


@rebalance.command()
@output_option("table", "json")
@click.pass_context
def resume(ctx: click.Context, output: str) -> None:
    """Resume a paused rebalance."""
    _change(ctx, "resume", output)


@rebalance.command()
@output_option("table", "json")
@click.pass_context
def abort(ctx: click.Context, output: str) -> None:
    """End the rebalance; moves in progress finish, and agents stay where they are."""
    _change(ctx, "abort", output)


def _change(ctx: click.Context, what: str, output: str) -> None:
    answer = api_of(ctx).post(f"/v1/rebalance:{what}", {}, RebalanceStateAnswer)
    if output == "json":
        print_json(answer)
    else:
        click.echo(f"rebalance: {clean(answer['state'])}")


def _of(one: RebalanceAnswer) -> str:
    target = one["target"]
    parts = [f"class {target['class']}"] if target["class"] else []
    parts += [f"{key}={value}" for key, value in sorted(target["labels"].items())]
    return ", ".join(parts) or "all"


def _print_hosts(ctx: click.Context, hosts: list[HostCount]) -> None:
    heads = ["HOST", "AGENTS"]
    rows: list[list[object]] = [[one["host"], one["agents"]] for one in hosts]
    if any("after" in one for one in hosts):
        heads.append("AFTER")
        rows = [[*row, one.get("after", "")] for row, one in zip(rows, hosts, strict=True)]
    print_table(heads, rows, no_color=no_color(ctx))


def _print_begun(ctx: click.Context, answer: RebalanceBegun, *, dry_run: bool) -> None:
    would = "would move" if dry_run else "move"
    click.echo(f"{clean(answer['to_move'])} devices {would}")
    if dry_run:
        _print_hosts(ctx, answer["hosts"])
    if answer["to_move"] and not answer["steers"]:
        click.echo(_UNSTEERED, err=True)


def _wait(ctx: click.Context, begun: str = "") -> None:
    """Wait until the rebalance `begun` is over ("" = the one in progress, if any), and print its progress. Waits also
    while the API does not answer.

    Raises ConflictError when it ends before the hosts are balanced, or when another one has replaced it."""
    printed, expected = "", begun
    while True:
        try:
            answer = api_of(ctx).get("/v1/rebalance", RebalancesAnswer)
        except TransientError:
            time.sleep(POLL_S)  # noqa: TID251  # a command that waits
            continue
        one = next(iter(answer["items"]), None)
        if one is None or (not expected and one["state"] in _OVER):
            return
        expected = expected or one["id"]
        if one["id"] != expected:
            raise ConflictError(
                "another rebalance has replaced the one that this command waits for"
            )
        if one["state"] == "done":
            click.echo(clean(one["reason"]), err=True)
            return
        if one["state"] in _OVER:
            raise ConflictError(f"the rebalance has {_ended(one)}")
        text = f"{one['state']}: {one['moved']} moved, {one['on_way']} on their way, {one['waiting']} wait"
        if text != printed:
            click.echo(clean(text), err=True)
            printed = text
        time.sleep(POLL_S)  # noqa: TID251  # a command that waits


def _ended(one: RebalanceAnswer) -> str:
    how = "been aborted" if one["state"] == "aborted" else "ended"
    return f"{how}: {clean(one['reason'])}"

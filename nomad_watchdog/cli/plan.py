"""``plan`` and ``apply``: print what a pass would do; do it, through the running service if there is one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

import click
from watchdog_agent.runtime.parsing import loads

from nomad_watchdog.cli._answers import PlanAnswer, parse
from nomad_watchdog.cli._apply import apply_by_service
from nomad_watchdog.cli._options import (
    api_of,
    no_color,
    output_option,
    require_terminal,
    settings_of,
)
from nomad_watchdog.daemon import factory, one_shot
from nomad_watchdog.errors import ConflictError, TransientError, UserError
from nomad_watchdog.terminal import clean, print_json, print_table

EXIT_CHANGES: Final = 2
MAX_NAMED: Final = 5
"""Waiting devices that are named in a table."""


@click.command()
@click.option("--detailed-exitcode", is_flag=True, help="Exit 2 when there is something to do.")
@output_option("table", "json")
@click.pass_context
def plan(ctx: click.Context, detailed_exitcode: bool, output: str) -> None:
    """Show which agents this configuration would start, replace and stop, and why. Changes nothing.

    A changed class is a roll-out: all its devices are counted, and the change is described. `apply FILE`
    applies a plan that was saved with `plan -o json > FILE`, unless the registry has changed since.
    """
    view = _plan(ctx)
    _print(view, output, ctx)
    if detailed_exitcode and (view["actions"] or view["held"]["count"] or view["waiting_rollout"]):
        ctx.exit(EXIT_CHANGES)


@click.command()
@click.argument("plan_file", required=False, type=click.Path(dir_okay=False))
@click.option("--auto-approve", is_flag=True, help="Skip the interactive approval.")
@click.option(
    "--allow-stops",
    type=click.IntRange(1),
    metavar="COUNT",
    help="Also approve the stops that are on hold; COUNT must be their number.",
)
@output_option("table", "json")
@click.pass_context
def apply(
    ctx: click.Context,
    plan_file: str | None,
    auto_approve: bool,
    allow_stops: int | None,
    output: str,
) -> None:
    """Apply a plan: that of PLAN_FILE, or a new one after confirmation. Waits until all roll-outs in it are
    done.

    If the service runs, it reloads its configuration and applies the plan itself.
    Exits 75 if the registry has changed since the plan was made, stops are on hold, a roll-out makes no
    progress, or the service has another configuration than this command. Exits 64 if an agent class can't
    be prepared, after everything else is done.
    """
    planned = _read(Path(plan_file)) if plan_file else _plan(ctx)
    held, actions = planned["held"], len(planned["actions"]) + planned["waiting_rollout"]
    if allow_stops is not None and allow_stops != held["count"]:
        raise UserError(f"--allow-stops {allow_stops}: {held['count']} stops are on hold")
    if not actions and not held["count"]:
        _print(planned, output, ctx)
        _check_classes(planned)
        return
    if held["count"] and allow_stops is None and not actions:
        raise TransientError(
            f"{held['count']} stops are on hold: {held.get('reason', '')}; to approve them: --allow-stops "
            f"{held['count']}"
        )
    if not auto_approve:
        _confirm(planned, allow_stops or 0, ctx)
    done = _apply(ctx, planned, from_file=plan_file is not None, allow_stops=allow_stops)
    _print(done, output, ctx)
    _check_classes(done)


def _apply(
    ctx: click.Context, planned: PlanAnswer, *, from_file: bool, allow_stops: int | None
) -> PlanAnswer:
    """Apply a plan through the running service, or without one. Raises as `apply_by_service` and `apply_once`."""
    settings = settings_of(ctx)
    running = asyncio.run(factory.replicas(settings))
    if not running:
        done = one_shot.apply_once(
            settings,
            registry_index=planned["registry_index"],
            allow_stops=allow_stops is not None,
            report_progress=lambda text: click.echo(clean(text), err=True),
        )
        return parse(asyncio.run(done), PlanAnswer)
    if from_file and (now := _plan(ctx)["registry_index"]) != planned["registry_index"]:
        raise ConflictError(
            f"the registry has moved from {planned['registry_index']} to {now} since the plan was "
            "made; make a new plan"
        )
    return apply_by_service(api_of(ctx), settings, running, planned, stops=allow_stops or 0)


def _check_classes(done: PlanAnswer) -> None:
    if refused := done.get("unprepared_classes"):
        names = ", ".join(sorted(refused))
        raise UserError(
            f"agent classes that can't be prepared; their devices keep their current agents: {names}"
        )


def _plan(ctx: click.Context) -> PlanAnswer:
    return parse(asyncio.run(one_shot.plan_once(settings_of(ctx))), PlanAnswer)


def _read(file: Path) -> PlanAnswer:
    name = ascii(str(file))
    try:
        found = loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"plan file {name}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"plan file {name} is not what `plan -o json` prints") from error
    if isinstance(found, dict):
        found = {"summary": "", "waiting_rollout": 0, **found}
    try:
        return parse(found, PlanAnswer)
    except ValueError as error:
        raise UserError(f"plan file {name} is not what `plan -o json` prints: {error}") from error


def _confirm(planned: PlanAnswer, stops: int, ctx: click.Context) -> None:
    require_terminal()
    _print(planned, "table", ctx)
    more = f" and {stops} held stops" if stops else ""
    count = len(planned["actions"]) + planned["waiting_rollout"]
    click.confirm(f"apply {count} actions{more}?", abort=True, err=True)


def _print(view: PlanAnswer, output: str, ctx: click.Context) -> None:
    if output == "json":
        print_json(view)
        return
    _print_actions(view, ctx)
    for one in [
        *view.get("rollouts", ()),
        *view.get("staged", ()),
        *view.get("inventory", ()),
    ]:
        click.echo(clean(one["text"]))
    if differing := view.get("not_in_force"):
        click.echo(
            f"not in force, as other replicas are configured differently: {clean(', '.join(differing))}"
        )
    for name, why in view.get("unprepared_classes", {}).items():
        click.echo(f"class {clean(name)} can't be prepared: {clean(why)}")
    click.echo(f"{clean(view['summary'])} (registry index {view['registry_index']})")
    if count := view["held"]["count"]:
        click.echo(f"on hold: {clean(view['held'].get('reason'))}")
        click.echo(f"to approve: nomad-watchdog apply --allow-stops {count}")
    for outcome, number in view.get("outcomes", {}).items():
        click.echo(f"{clean(outcome)}: {number}")


def _print_actions(view: PlanAnswer, ctx: click.Context) -> None:
    columns = ("kind", "device", "epoch", "placement", "reason")
    rows = [[action.get(name) for name in columns] for action in view["actions"]]
    if rows:
        print_table([name.upper() for name in columns], rows, no_color=no_color(ctx))
    if waiting := view["waiting_rollout"]:
        ids = view.get("waiting", [])
        more = ", …" if waiting > MAX_NAMED else ""
        names = f": {', '.join(map(clean, ids[:MAX_NAMED]))}{more}" if ids else ""
        click.echo(f"{waiting} more wait{'s' * (waiting == 1)} for a turn{names}")

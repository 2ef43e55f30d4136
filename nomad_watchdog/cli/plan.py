"""``plan`` and ``apply``: what a pass would do, and doing it, by the running service if there is one."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any, Final

import click
from watchdog_agent.runtime.parsing import loads

from nomad_watchdog.cli._apply import apply_by_service
from nomad_watchdog.cli._options import api_of, no_color, output_option, settings_of
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

    A changed class is a roll-out: all its devices are counted, with the change in words. `plan -o json >
    FILE` and `apply FILE` carries it out, or refuses if the registry has moved.
    """
    view = _view(ctx)
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
    help="Also approve the stops that the mass-change breaker holds; COUNT must be their number.",
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
    """Carry out a plan: that of PLAN_FILE, or a new one after asking. Waits until all roll-outs in it are
    done.

    While the service runs, it is told to read its configuration again, and carries out the plan itself.
    Exits 75 when the registry has moved since the plan, when stops are held, when a roll-out makes no
    progress, or when the service runs another configuration than this one. Exits 64 if an agent class can't
    be prepared, when all else is done.
    """
    shown = _read(Path(plan_file)) if plan_file else _view(ctx)
    held, actions = shown["held"], len(shown["actions"]) + shown["waiting_rollout"]
    if allow_stops is not None and allow_stops != held["count"]:
        raise UserError(f"--allow-stops {allow_stops}: {held['count']} stops are held")
    if not actions and not held["count"]:
        _print(shown, output, ctx)
        _check_classes(shown)
        return
    if held["count"] and allow_stops is None and not actions:
        raise TransientError(
            f"{held['count']} stops are held: {held['reason']}; if they are meant: --allow-stops "
            f"{held['count']}"
        )
    if not auto_approve:
        _ask(shown, allow_stops or 0, ctx)

    settings = settings_of(ctx)
    running = asyncio.run(factory.replicas(settings))
    if running:
        if plan_file and (now := _view(ctx)["registry_index"]) != shown["registry_index"]:
            raise ConflictError(
                f"the registry has moved from {shown['registry_index']} to {now} since the plan was "
                "made; make a new plan"
            )
        done = apply_by_service(api_of(ctx), settings, running, shown, stops=allow_stops or 0)
    else:
        done = asyncio.run(
            one_shot.apply_once(
                settings,
                registry_index=shown["registry_index"],
                allow_stops=allow_stops is not None,
                tell=lambda text: click.echo(clean(text), err=True),
            )
        )
    _print(done, output, ctx)
    _check_classes(done)


def _check_classes(done: dict[str, Any]) -> None:
    if refused := done.get("unprepared_classes"):
        names = ", ".join(sorted(refused))
        raise UserError(
            f"agent classes that can't be prepared, whose devices keep the agents that they have: {names}"
        )


def _view(ctx: click.Context) -> dict[str, Any]:

    return asyncio.run(one_shot.plan_once(settings_of(ctx)))


def _read(file: Path) -> dict[str, Any]:
    name = ascii(str(file))
    try:
        found = loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"plan file {name}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"plan file {name} is not what `plan -o json` prints") from error
    good = (
        isinstance(found, dict)
        and isinstance(found.get("registry_index"), int)
        and isinstance(found.get("actions"), list)
        and all(isinstance(action, dict) for action in found["actions"])
        and isinstance(found.get("held"), dict)
        and isinstance(found["held"].get("count"), int)
        and isinstance(found.get("waiting_rollout", 0), int)
    )
    if not good:
        raise UserError(f"plan file {name} is not what `plan -o json` prints")
    return {"summary": "", "waiting_rollout": 0, **found}


def _ask(shown: dict[str, Any], stops: int, ctx: click.Context) -> None:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UserError("no terminal to ask on; --auto-approve applies without asking")
    _print(shown, "table", ctx)
    more = f" and {stops} held stops" if stops else ""
    count = len(shown["actions"]) + shown["waiting_rollout"]
    click.confirm(f"apply {count} actions{more}?", abort=True, err=True)


def _print(view: dict[str, Any], output: str, ctx: click.Context) -> None:
    if output == "json":
        print_json(view)
        return
    columns = ("kind", "device", "epoch", "placement", "reason")
    rows = [[action.get(name) for name in columns] for action in view["actions"]]
    if rows:
        print_table([name.upper() for name in columns], rows, no_color=no_color(ctx))
    if waiting := view["waiting_rollout"]:
        ids = view.get("waiting") or ()
        more = ", …" if waiting > MAX_NAMED else ""
        names = f": {', '.join(map(clean, ids[:MAX_NAMED]))}{more}" if ids else ""
        click.echo(f"{waiting} more wait{'s' * (waiting == 1)} for a turn{names}")
    for one in view.get("rollouts") or ():
        click.echo(clean(one.get("text")))
    for one in view.get("inventory") or ():
        click.echo(clean(one.get("text")))
    if differing := view.get("not_in_force"):
        click.echo(
            f"not in force, as other replicas are configured differently: {clean(', '.join(differing))}"
        )
    for name, why in (view.get("unprepared_classes") or {}).items():
        click.echo(f"class {clean(name)} can't be prepared: {clean(why)}")
    click.echo(f"{clean(view['summary'])} (registry index {clean(view['registry_index'])})")
    if view["held"]["count"]:
        click.echo(f"held: {clean(view['held'].get('reason'))}")
        click.echo(f"if they are meant: nomad-watchdog apply --allow-stops {view['held']['count']}")
    for outcome, count in (view.get("outcomes") or {}).items():
        click.echo(f"{clean(outcome)}: {clean(count)}")

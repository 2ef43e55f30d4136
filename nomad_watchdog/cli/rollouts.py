"""``rollouts``: follow and control how new versions of agent classes are rolled out."""

from __future__ import annotations

import sys
import time
from typing import Final

import click

from nomad_watchdog.cli import _complete
from nomad_watchdog.cli._answers import PastRollouts, RolloutAnswer, RolloutsAnswer
from nomad_watchdog.cli._api_client import quoted
from nomad_watchdog.cli._fields import rollout_line
from nomad_watchdog.cli._options import api_of, caller, no_color, output_option
from nomad_watchdog.errors import TransientError
from nomad_watchdog.terminal import clean, print_json, print_table
from nomad_watchdog.units import utc

POLL_S: Final = 1.0
EXIT_PAUSED: Final = 75
EXIT_ABORTED: Final = 70
_EXITS: Final = {
    "complete": 0,
    "paused": EXIT_PAUSED,
    "aborted": EXIT_ABORTED,
    "halted": EXIT_ABORTED,
}
"""State → exit code of `status`; in another state a roll-out goes on."""


@click.group()
def rollouts() -> None:
    """Follow and control roll-outs of new agent versions."""


@rollouts.command("ls")
@output_option("table", "json")
@click.pass_context
def list_rollouts(ctx: click.Context, output: str) -> None:
    """List the agent classes and their roll-outs."""
    answer = api_of(ctx).get("/v1/rollouts", RolloutsAnswer)
    if output == "json":
        print_json(answer)
        return
    heads = [
        "CLASS",
        "VERSION",
        "PROVEN",
        "STATE",
        "STEP",
        "OK",
        "BAD",
        "WAITING",
        "REASON",
        "NEXT",
    ]
    rows = [
        [
            one["class"],
            one["version"],
            one["proven"] or "-",
            one["state"],
            one["step"] or "-",
            one["ok"],
            one["failed"],
            one["waiting"],
            one["reason"],
            one["next"],
        ]
        for one in answer["items"]
    ]
    print_table(heads, rows, no_color=no_color(ctx))
    if answer["problem"]:
        click.echo(clean(answer["problem"]), err=True)


@rollouts.command()
@click.argument("agent_class", metavar="CLASS", shell_complete=_complete.agent_classes)
@click.option("--wait", is_flag=True, help="Wait until it is complete, paused or aborted.")
@output_option("table", "json")
@click.pass_context
def status(ctx: click.Context, agent_class: str, wait: bool, output: str) -> None:
    """Show the roll-out of CLASS.

    Exit codes: 0 complete (without --wait: or in progress), 75 paused, 70 aborted or halted."""
    answer = _wait(ctx, agent_class) if wait else _get(ctx, agent_class)
    if output == "json":
        print_json(answer)
    else:
        _print(answer)
    if code := _EXITS.get(answer["state"], 0):
        sys.exit(code)


@rollouts.command()
@click.argument("agent_class", metavar="CLASS", shell_complete=_complete.agent_classes)
@output_option("table", "json")
@click.pass_context
def history(ctx: click.Context, agent_class: str, output: str) -> None:
    """List the roll-outs of CLASS that are over, the newest last."""
    answer = api_of(ctx).get(f"/v1/rollouts/{quoted(agent_class)}/history", PastRollouts)
    if output == "json":
        print_json(answer)
        return
    rows = [
        [utc(one["at"]), one["version"], one["outcome"], one["by"] or "-", one["why"]]
        for one in answer["items"]
    ]
    heads = ["AT", "VERSION", "OUTCOME", "BY", "REASON"]
    print_table(heads if rows else ["no roll-outs"], rows, no_color=no_color(ctx))


@rollouts.command()
@click.argument("agent_class", metavar="CLASS", shell_complete=_complete.agent_classes)
@click.pass_context
def diff(ctx: click.Context, agent_class: str) -> None:
    """Print what the configured version of CLASS changes in the proven one."""
    answer = _get(ctx, agent_class)
    if answer["version"] == answer["proven"] and not answer["change"]:
        click.echo(f"no difference: version {clean(answer['version'])} is the proven one")
        return
    proven = answer["proven"] or "none"
    click.echo(f"version {clean(proven)} -> {clean(answer['version'])}")
    click.echo(clean(answer["change"] or "the changes are not known in words"))


@rollouts.command()
@click.argument("agent_class", metavar="CLASS", shell_complete=_complete.agent_classes)
@click.option("--all", "everything", is_flag=True, help="Also skip all later pauses and soaks.")
@output_option("table", "json")
@click.pass_context
def promote(ctx: click.Context, agent_class: str, everything: bool, output: str) -> None:
    """End the pause or soak of the current step."""
    _control(ctx, agent_class, "promote-all" if everything else "promote", output)


def _add(what: str, summary: str) -> None:
    """Add the command of a request that has no options of its own."""

    @rollouts.command(what, help=summary)
    @click.argument("agent_class", metavar="CLASS", shell_complete=_complete.agent_classes)
    @output_option("table", "json")
    @click.pass_context
    def request(ctx: click.Context, agent_class: str, output: str) -> None:
        _control(ctx, agent_class, what, output)


_add("pause", "Replace no more agents; replacements in progress finish.")
_add("resume", "Resume a paused roll-out.")
_add("abort", "Give the version up, and go back to the proven one.")
_add("retry", "Continue with a version that was given up, at the step where it was.")
_add("undo", "Go back to the version before; also after the roll-out is complete.")


def _get(ctx: click.Context, agent_class: str) -> RolloutAnswer:
    return api_of(ctx).get(f"/v1/rollouts/{quoted(agent_class)}", RolloutAnswer)


def _control(ctx: click.Context, agent_class: str, what: str, output: str) -> None:
    path = f"/v1/rollouts/{quoted(agent_class)}/{what}"
    answer = api_of(ctx).post(path, {"by": caller()}, RolloutAnswer)
    if output == "json":
        print_json(answer)
    else:
        _print(answer)


def _print(answer: RolloutAnswer) -> None:
    click.echo(clean(rollout_line(answer)))
    if answer["reason"]:
        click.echo(clean(answer["reason"]))
    click.echo(
        clean(
            f"{answer['on_version']} of {answer['devices']} devices have version {answer['version']}; "
            f"proven is {answer['proven'] or 'none'}"
        )
    )


def _wait(ctx: click.Context, agent_class: str) -> RolloutAnswer:
    """Wait until the roll-out stops; its progress goes to standard error. Waits also while the API does not answer."""
    printed = ""
    while True:
        try:
            answer = _get(ctx, agent_class)
        except TransientError:
            time.sleep(POLL_S)  # noqa: TID251  # a command that waits
            continue
        if answer["state"] in _EXITS:
            return answer
        if (line := rollout_line(answer)) != printed:
            click.echo(clean(line), err=True)
            printed = line
        time.sleep(POLL_S)  # noqa: TID251  # a command that waits

"""The command line: the table of commands, common options, and exit codes.

Only click is imported here. The module of a command is imported when the command runs. Its one-line help is in the
table below, so that ``nomad-watchdog --help`` imports none of them.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final, NoReturn

import click

from nomad_watchdog import __version__
from nomad_watchdog.cli._global_options import GLOBAL, accept_after
from nomad_watchdog.errors import WatchdogError

EXIT_USAGE: Final = 64
EXIT_INTERNAL: Final = 70
EXIT_INTERRUPTED: Final = 130

VERBS: Final[dict[str, tuple[str, str]]] = {
    "run": ("run:run", "Run the control plane."),
    "init": ("run:init", "Prepare a new, empty registry."),
    "devices": ("devices:devices", "Add, list and remove devices."),
    "agents": ("agents:agents", "List agents, print their logs, run their probes now."),
    "status": ("status:status", "Show the state of the fleet."),
    "explain": ("status:explain", "Explain the state of a device."),
    "leader": ("status:leader", "Show which replica holds each shard."),
    "plan": ("plan:plan", "Show pending starts, replacements and stops."),
    "apply": ("plan:apply", "Apply the pending changes, including roll-outs."),
    "stops": ("stops:stops", "List or approve stops that are on hold."),
    "departures": ("departures:departures", "List or approve departures that are on hold."),
    "rollouts": ("rollouts:rollouts", "Follow and control roll-outs."),
    "migrate": ("migrate:migrate", "Move agents to another scheduler."),
    "hosts": ("hosts:hosts", "List the hosts of the agents with their pressure."),
    "rebalance": ("rebalance:rebalance", "Move agents to hosts that have fewer."),
    "pools": ("pools:pools", "List, scale and remove worker pools."),
    "pause": ("pauses:pause", "Pause all actions for devices."),
    "resume": ("pauses:resume", "End a pause."),
    "maintenance": ("pauses:maintenance", "Manage maintenance windows."),
    "events": ("status:events", "Print events; -f follows them."),
    "incidents": ("incidents:incidents", "List incidents: problems that many devices share."),
    "registry": ("registry:registry", "Back up and restore the registry."),
    "doctor": ("doctor:doctor", "Check the environment and suggest fixes."),
    "config": ("config:config", "Check or show the configuration."),
    "demo": ("run:demo", "Run a demo with simulated devices."),
    "completion": ("completion:completion", "Print the completion script of a shell."),
    "version": ("completion:version", "Print the version."),
}


class LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click's signature
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in VERBS:
            return None
        module, name = VERBS[cmd_name][0].split(":")
        found = getattr(import_module(f"nomad_watchdog.cli.{module}"), name)
        assert isinstance(found, click.Command)
        accept_after(found, [one for one in self.params if one.name in GLOBAL])
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in VERBS.items()])


@click.group(
    cls=LazyGroup,
    commands={name: click.Command(name) for name in VERBS},  # for "did you mean"; not imported yet
    context_settings={
        "auto_envvar_prefix": "NOMAD_WATCHDOG",
        "help_option_names": ["-h", "--help"],
    },
)
@click.version_option(__version__, prog_name="nomad-watchdog")
@click.option(
    "--config", metavar="FILE", help="Configuration [default: ./nomad-watchdog.hcl if any]."
)
@click.option("--backend", metavar="NAME", help="Scheduler backend; overrides the configuration.")
@click.option(
    "--address", metavar="URL", envvar="NOMAD_WATCHDOG_ADDR", help="Address of the running API."
)
@click.option("--no-color", is_flag=True, help="Disable colours.")
@click.pass_context
def cli(
    ctx: click.Context, config: str | None, backend: str | None, address: str | None, no_color: bool
) -> None:
    """Keep exactly one watchdog agent running per device.

    The options below are accepted before and after the command's name.

    Exit codes: 0 done, 2 changes (plan --detailed-exitcode), 64 wrong usage or configuration, 66 no
    such device, 69 unavailable, 70 internal error, 75 try again, 77 denied, 130 interrupted.
    """
    ctx.obj = {"config": config, "backend": backend, "address": address, "no_color": no_color}
    # Any value but the empty one counts (no-color.org), so click must not read it as a boolean.
    no_color = no_color or bool(os.environ.get("NO_COLOR"))
    ctx.obj["no_color"] = no_color
    if no_color:
        ctx.color = False


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    os.umask(0o077)  # files that we write are private, whatever the caller's umask is
    gc.set_threshold(10_000, 10, 10)  # imports create many objects, and hardly any garbage
    code = _code(argv)
    gc.disable()  # the remaining objects end with the process
    sys.exit(code)


def _code(argv: Sequence[str] | None) -> int:
    try:
        result = cli.main(argv, prog_name="nomad-watchdog", standalone_mode=False)
    except click.UsageError as error:
        error.show()
        return EXIT_USAGE
    except click.ClickException as error:
        error.show()
        return EXIT_USAGE
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return EXIT_INTERRUPTED
    except WatchdogError as error:
        from nomad_watchdog.terminal import clean

        for line in str(error).splitlines():
            click.echo(f"error: {clean(line)}", err=True)
        return error.exit_code
    except BrokenPipeError:
        # The reader, such as `| head`, has ended. Without stdout the interpreter prints no error at its last flush.
        sys.stdout = None
        return 0
    except Exception:  # noqa: BLE001  # the program's boundary: a traceback may quote a secret
        import traceback

        from nomad_watchdog.secret_values import hide

        click.echo(hide(traceback.format_exc()), err=True)
        return EXIT_INTERNAL
    return result if isinstance(result, int) else 0

"""The options of the program itself are also accepted after the name of a command."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import click
from click.core import ParameterSource

GLOBAL: Final = ("config", "backend", "address", "no_color")
"""The names of these options, and of their values in `ctx.obj`."""
_LATER: Final = f"{__name__}."


def accept_after(command: click.Command, options: Iterable[click.Parameter]) -> None:
    """Let a command and its subcommands take these options too, unless they have an option of that name themselves.
    They are not listed in its help."""
    taken = {name for param in command.params for name in param.opts}
    for option in options:
        if isinstance(option, click.Option) and not taken & set(option.opts):
            command.params.append(_again(option))
    if isinstance(command, click.Group):
        for one in command.commands.values():
            accept_after(one, options)


def _again(option: click.Option) -> click.Option:
    return click.Option(
        option.opts,
        is_flag=option.is_flag or None,  # False would make the value optional
        metavar=option.metavar,
        hidden=True,
        expose_value=False,
        callback=_store,
        allow_from_autoenv=False,
    )


def _store(ctx: click.Context, param: click.Parameter, value: object) -> None:
    if param.name and ctx.get_parameter_source(param.name) is ParameterSource.COMMANDLINE:
        ctx.meta[f"{_LATER}{param.name}"] = value
        if ctx.obj is not None:  # None: a shell completes, and no command runs
            ctx.obj[param.name] = value
        if param.name == "no_color" and value:
            ctx.color = False


def given(ctx: click.Context) -> dict[str, object]:
    """The values of these options while a shell completes. An option of the command itself is none of them, even if it
    has the same name: `devices add --address` is a device's."""
    root = ctx.find_root().params
    return {name: ctx.meta.get(f"{_LATER}{name}", root.get(name)) for name in GLOBAL}

"""``completion`` and ``version``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from nomad_watchdog import __version__


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of SHELL: `source <(nomad-watchdog completion bash)`."""
    found = get_completion_class(shell)
    assert found is not None
    root = ctx.find_root().command
    script = found(root, {}, "nomad-watchdog", "_NOMAD_WATCHDOG_COMPLETE")
    # click's bash class would run bash to learn its version before it prints; the text is the same.
    click.echo(script.source_template % script.source_vars())


@click.command()
def version() -> None:
    """Print the version."""
    click.echo(__version__)

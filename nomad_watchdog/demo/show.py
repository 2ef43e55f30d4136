"""What the demo shows: a live table on a terminal, plain lines elsewhere. All of it on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

COLORS = {
    "watched": "green",
    "starting": "yellow",
    "suspect": "yellow",
    "repairing": "yellow",
    "offline": "red",
    "unwatched": "magenta",
    "failing": "red",
    "departed": "dim",
}


class Show:
    """Draws; knows nothing of what happens."""

    def __init__(self, *, live: bool) -> None:
        self.console = Console(stderr=True)
        self._live = Live(console=self.console, refresh_per_second=4) if live else None
        self._bar: Progress | None = None
        self._last = -1

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """One line."""
        self._line(escape(text))

    def step(self, name: str) -> None:
        """A step begins."""
        self._line(f"[bold]▶[/bold] {escape(name)}")

    def done(self, name: str, detail: str, took_s: float, *, converged: bool) -> None:
        """A step has ended."""
        mark = "[green]ok[/green]" if converged else "[red]NOT CONVERGED[/red]"
        self._line(f"  {mark} {escape(name)}: {escape(detail)} ({took_s:.1f} s)")

    def _line(self, markup: str) -> None:
        # Where there is no terminal a line stays one line, however long: somebody may grep for it.
        plain = not self.console.is_terminal
        self.console.print(markup, highlight=False, soft_wrap=plain)

    @contextmanager
    def progress(self, total: int) -> Iterator[Callable[[int], None]]:
        """A bar while the fleet comes up; lines where there is no terminal."""
        bar = Progress(
            TextColumn("agents ready"), BarColumn(), MofNCompleteColumn(), console=self.console
        )
        task = bar.add_task("agents", total=total)
        self._bar = bar

        def advance(done: int) -> None:
            bar.update(task, completed=done)
            if self._live is None and done != self._last:
                self._last = done
                self._line(f"  agents ready {done}/{total}")

        try:
            yield advance
        finally:
            self._bar = None

    def table(self, items: list[dict[str, Any]]) -> None:
        """Draw the devices anew."""
        if self._live is None:
            return
        table = Table("device", "verdict", "node", "version", "age", "reason", box=None)
        for item in items:
            verdict = str(item["verdict"])
            age = item.get("agent_age_s")
            table.add_row(
                escape(str(item["id"])),
                f"[{COLORS.get(verdict, 'white')}]{escape(verdict)}[/]",
                escape(str(item.get("node") or "")),
                escape(str(item.get("version") or "")),
                "" if age is None else f"{age:.0f} s",
                escape(str(item.get("reason") or "")[:60]),
            )
        self._live.update(Group(*(p for p in (self._bar, table) if p is not None)))

    def summary(self, summary: dict[str, Any]) -> None:
        """The end, on stdout."""
        out = Console()
        verdict = "every step converged" if summary["converged"] else "not every step converged"
        last = f"{summary['backend']}: {verdict} in {summary['took_s']:.1f} s"
        if not out.is_terminal:
            for step in summary["steps"]:
                result = "converged" if step["converged"] else "NOT CONVERGED"
                print(f"{result}\t{step['took_s']:.1f} s\t{step['name']}: {step['detail']}")
            print(last)
            return
        table = Table("step", "result", "took", "detail")
        for step in summary["steps"]:
            table.add_row(
                escape(step["name"]),
                "[green]converged[/green]" if step["converged"] else "[red]no[/red]",
                f"{step['took_s']:.1f} s",
                escape(step["detail"]),
            )
        out.print(table)
        out.print(last)

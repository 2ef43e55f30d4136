"""The output of the demo: a small live view on a terminal, one line per finished step everywhere."""

from __future__ import annotations

import asyncio
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from typing import Final, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from nomad_watchdog.demo.stage import StageDevice
from nomad_watchdog.terminal import COLOURS

VIEW_LINES: Final = 6
"""Maximum number of lines of the live view without the devices: the step in progress, which may be wrapped, an empty
line, the numbers per verdict, "and N more", and the line of the cursor."""
VERDICT_WIDTH: Final = 10
REFRESH_S: Final = 0.25


class Show:
    """Prints to standard output, or to standard error if another result goes to standard output."""

    def __init__(self, *, stderr: bool = False, no_color: bool = False) -> None:
        self.console = Console(stderr=stderr, no_color=no_color or None, highlight=False)
        self._printed = 0
        """Lines above the live view."""
        self._running = ""
        self._began = 0.0
        self._devices: Sequence[StageDevice] = ()
        # A thread that refreshes would erase lines of what is printed at the same moment.
        self._live = Live(
            console=self.console, get_renderable=self._view, auto_refresh=False, transient=True
        )
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        """Start the live view, if the output is a terminal. Needs a running event loop."""
        if self.console.is_terminal:
            self._live.start()
            self._refresh()
        return self

    def _refresh(self) -> None:
        self._live.refresh()
        self._timer = asyncio.get_running_loop().call_later(REFRESH_S, self._refresh)

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Remove the live view. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
        self._live.stop()

    def line(self, text: str, style: str = "") -> None:
        """Print a line; on a terminal it is wrapped between words."""
        if self.console.is_terminal:
            self._print(Text(text, style))
        else:
            # A line stays whole, however long: a program may search it.
            self.console.print(Text(text, style), soft_wrap=True)

    def command(self, text: str) -> None:
        """Print a shell command. It is never wrapped, so that it can be pasted."""
        self.console.print(Text(f"  {text}", "bold"), soft_wrap=True)

    def running(self, name: str) -> None:
        """Name the step in progress in the live view."""
        self._running, self._began = name, time.monotonic()

    def done(self, name: str, detail: str, took_s: float, *, converged: bool) -> None:
        """Print a finished step."""
        self._running = ""
        mark = Text("ok", "green") if converged else Text("FAIL", "bold red")
        text = f"{name}: {' '.join(detail.split())}"
        if self.console.is_terminal:
            self._print(_step(mark, took_s, text))
        else:
            self.line(f"{mark.plain:<4}  {took_s:4.1f} s  {text}")

    def _print(self, what: RenderableType) -> None:
        self._printed += len(self.console.render_lines(what))
        if self._live.is_started:
            self._live.refresh()  # to make room first: printing redraws the view with its last height
        self.console.print(what)

    def devices(self, items: Sequence[StageDevice]) -> None:
        """Display these devices in the live view."""
        self._devices = items

    def _view(self) -> RenderableType:
        """The step in progress, the number of devices per verdict, and the devices to look at."""
        lines: list[RenderableType] = []
        if self._running:
            took_s = time.monotonic() - self._began
            lines.append(_step(Text("..", "yellow"), took_s, self._running))
        if counts := Counter(str(item["verdict"]) for item in self._devices):
            found = (
                Text(f"{count} {verdict}", COLOURS.get(verdict, ""))
                for verdict, count in counts.most_common()
            )
            lines.append(Text("\ndevices: ").append_text(Text(", ").join(found)))
        # Else the terminal would scroll, and a finished step would be lost.
        room = max(0, self.console.height - self._printed - VIEW_LINES)
        unwatched = [item for item in self._devices if item["verdict"] != "watched"]
        lines += [self._device(item) for item in unwatched[:room]]
        if more := unwatched[room:]:
            lines.append(Text(f"  and {len(more)} more"))
        return Group(*lines)

    def _device(self, item: StageDevice) -> Text:
        """A device in one line: its reason is shortened between words."""
        verdict = str(item["verdict"])
        start = f"  {item['id']}  {verdict:<{VERDICT_WIDTH}}  "
        room = max(10, self.console.width - len(start))
        reason = textwrap.shorten(str(item.get("reason") or ""), room, placeholder=" ...")
        return Text(start + reason, COLOURS.get(verdict, ""), no_wrap=True, overflow="crop")


def _step(mark: Text, took_s: float, text: str) -> Table:
    """A step: its result, its duration and its text, which is wrapped in a column of its own."""
    row = Table.grid(padding=(0, 2))
    row.add_column(min_width=4)
    row.add_column(justify="right", min_width=6)
    row.add_column(overflow="fold")
    row.add_row(mark, Text(f"{took_s:.1f} s"), Text(text))
    return row

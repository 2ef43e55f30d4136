"""The live view of the demo."""

from __future__ import annotations

import io

import pyte
import pytest
from rich.console import Console

from nomad_watchdog.demo.display import Show


@pytest.mark.parametrize("height", [10, 24, 60])
@pytest.mark.parametrize("unwatched", [0, 3, 20])
@pytest.mark.parametrize("finished", range(8))
def test_finished_steps_and_the_live_view_fit_the_terminal(
    finished: int, unwatched: int, height: int
) -> None:
    """However many devices are not watched, no printed line scrolls away, as long as there is a line for the view at
    all."""
    show = Show()
    show.console = Console(width=80, height=height, force_terminal=True, file=io.StringIO())
    for number in range(finished):
        show.done(f"step {number}", "word " * 20, 1.0, converged=True)
    show.running("a step whose name is so long that it takes more than one line " * 2)
    device = {"id": "device-01", "verdict": "starting", "reason": "agent running, no report of it"}
    show.devices([{**device, "id": f"device-{n}"} for n in range(unwatched)])
    printed = show.console.file.getvalue().count("\n")
    view = show.console.render_lines(show._view(), pad=False)
    shown = sum("device-" in "".join(one.text for one in line) for line in view)
    assert shown == 0 or printed + len(view) < height
    assert shown == unwatched or printed + len(view) >= min(height, 24) - 6


@pytest.mark.parametrize("unwatched", [3, 20])
async def test_no_finished_step_is_lost_while_the_view_changes_its_height(unwatched: int) -> None:
    """Steps end while many devices are listed: each is completely on the screen, and nothing scrolled away."""
    screen = pyte.HistoryScreen(80, 24, history=100)
    stream = pyte.Stream(screen)
    show = Show()
    out = io.StringIO()
    show.console = Console(width=80, height=24, force_terminal=True, file=out)
    show._live.console = show.console
    device = {"id": "device-01", "verdict": "starting", "reason": "agent running, no report of it"}
    with show:
        for number in range(7):
            show.running(f"step {number} {'word ' * 15}")
            show.devices([{**device, "id": f"device-{n}"} for n in range(unwatched)])
            show._live.refresh()
            show.done(f"step {number}", f"{'word ' * 14}end of {number}", 1.0, converged=True)
            show.devices([])
    stream.feed(out.getvalue().replace("\n", "\r\n"))
    text = "\n".join(screen.display)
    assert len(screen.history.top) == 0, text
    for number in range(7):
        assert text.count(f"step {number}:") == 1, text
        assert text.count(f"end of {number}") == 1, text

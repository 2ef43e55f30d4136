"""The live view of the demo."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from nomad_watchdog.demo.display import Show


@pytest.mark.parametrize("height", [10, 24, 60])
@pytest.mark.parametrize("unwatched", [0, 3, 20])
@pytest.mark.parametrize("finished", range(8))
def test_finished_steps_and_the_live_view_fit_the_terminal(
    finished: int, unwatched: int, height: int
) -> None:
    """However many devices are not watched, nothing that was printed scrolls away, as long as a line is left for
    the view at all."""
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

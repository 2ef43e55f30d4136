"""The fail points of the fault matrix: inactive without the variable, fatal with it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from nomad_watchdog import failpoints
from nomad_watchdog.errors import UserError


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    failpoints.arm({})


def test_nothing_is_armed_without_the_variable() -> None:
    """Every point can be passed in a process without the variable."""
    failpoints.arm({})
    for point in failpoints.POINTS:
        failpoints.reached(point)

    assert failpoints.armed() == ""


@pytest.mark.parametrize("text", ["K5", "K99:kill", "K5:stop", "K5:kill@0", "K5:kill@x", "5:kill"])
def test_a_point_that_is_not_known_is_refused(text: str) -> None:
    """A mistyped fail point would make a row of the matrix prove nothing: it is an error that names all points."""
    with pytest.raises(UserError, match=r"K1, .*K10"):
        failpoints.arm({failpoints.VARIABLE: text})


def test_the_third_visit_kills_and_other_points_do_not() -> None:
    """`K5:kill@3` lets two visits pass, ignores K4, and ends the process with SIGKILL."""
    code = (
        "from nomad_watchdog import failpoints as f\n"
        "f.arm({f.VARIABLE: 'K5:kill@3'})\n"
        "for n in range(9):\n"
        "    f.reached('K4')\n"
        "    print(n, flush=True)\n"
        "    f.reached('K5')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, timeout=30, check=False
    )

    assert (done.returncode, done.stdout.split()) == (-signal.SIGKILL, [b"0", b"1", b"2"])

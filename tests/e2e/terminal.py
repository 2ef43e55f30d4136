"""Runs a program on a real pseudo-terminal of 80x24 and models the screen that its user sees."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pyte

COLUMNS: Final = 80
ROWS: Final = 24
OWN_TERMINAL: Final = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)
"""Makes standard input the controlling terminal of a new session, so that Ctrl-C sends SIGINT."""


class Terminal:
    """A program on a pseudo-terminal; its output is fed to a model of the screen."""

    def __init__(self, master: int, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.scrolled_off = 0
        """Number of lines that scrolled off the top of the screen."""
        self.widest = 0
        """The longest line so far, on a terminal that is wide enough not to wrap it."""
        self._master = master
        self._screen: Any = pyte.HistoryScreen(COLUMNS, ROWS, history=1000)
        self._wide: Any = pyte.Screen(4 * COLUMNS, ROWS)
        self._streams = [pyte.ByteStream(self._screen), pyte.ByteStream(self._wide)]

    @property
    def rows(self) -> list[str]:
        return [str(row).rstrip() for row in self._screen.display]

    @property
    def text(self) -> str:
        """The words of the screen, separated by single blanks. A word that was cut counts as
        two."""
        return " ".join(" ".join(self.rows).split())

    def type(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def read(self, until: Callable[[], bool] = lambda: False, timeout_s: float = 90.0) -> None:
        """Read the output until a condition holds or the program closes the terminal."""
        deadline = time.monotonic() + timeout_s
        while not until():
            assert time.monotonic() < deadline, "\n".join(self.rows)
            if not select.select([self._master], [], [], 0.1)[0]:
                continue
            try:
                data = os.read(self._master, 65536)
            except OSError:  # on Linux: the other end is closed
                return
            for stream in self._streams:
                stream.feed(data)
            self.scrolled_off = len(self._screen.history.top)
            self.widest = max(self.widest, *(len(row.rstrip()) for row in self._wide.display))


@contextmanager
def terminal(argv: Sequence[str], *, cwd: Path, env: Mapping[str, str]) -> Iterator[Terminal]:
    """Run a program, given by its path, on its own terminal; kill it on exit."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", OWN_TERMINAL, *argv],
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True, cwd=cwd, env=dict(env),
        )  # fmt: skip
    finally:
        os.close(slave)
    try:
        yield Terminal(master, process)
    finally:
        process.kill()
        process.wait()
        os.close(master)

"""One thread, one selector, a heap of timers. What takes long is broken into events here, so that a
wedged device can hold up neither a signal nor the health check."""

from __future__ import annotations

import heapq
import os
import selectors
import signal
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .shapes import Timer, Watched


def between(low: float, high: float) -> float:
    """A random number from low to high, for jitter. The module random would cost 0.25 MB."""
    return low + (high - low) * int.from_bytes(os.urandom(4), "big") / 0xFFFFFFFF


class Loop:
    """Runs callbacks until `stop`. Signals wake it through a pipe."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self._timers: list[Timer] = []
        self._sequence = 0
        self._stopped = False
        self._on_signal: Callable[[int], None] | None = None
        self._read, self._write = os.pipe()
        for fd in (self._read, self._write):
            os.set_blocking(fd, False)
        self.selector.register(self._read, selectors.EVENT_READ, self._signalled)

    def on_signals(self, numbers: Iterable[int], callback: Callable[[int], None]) -> None:
        """Call back with the number when one of these signals comes."""
        self._on_signal = callback
        for number in numbers:
            signal.signal(number, lambda _number, _frame: None)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)

    def _signalled(self, _mask: int) -> None:
        for number in os.read(self._read, 64):
            if self._on_signal is not None:
                self._on_signal(number)

    def later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        """Call back after delay_s; gives a list whose [2] may be set to None to cancel it."""
        self._sequence += 1
        timer: Timer = [time.monotonic() + delay_s, self._sequence, callback]
        heapq.heappush(self._timers, timer)
        return timer

    def watch(self, sock: Watched, events: int, callback: Callable[[int], None]) -> None:
        """Call back with the ready events of sock; calling it again changes what is watched."""
        try:
            self.selector.modify(sock, events, callback)
        except KeyError:
            self.selector.register(sock, events, callback)

    def forget(self, sock: Watched) -> None:
        """Watch sock no more and close it."""
        try:
            self.selector.unregister(sock)
        except (KeyError, ValueError):
            pass
        sock.close()

    def close(self) -> None:
        """Give back the selector and the pipe."""
        self.selector.close()
        os.close(self._read)
        os.close(self._write)

    def stop(self) -> None:
        """Return from `run` after the callback that is running."""
        self._stopped = True

    def run(self) -> None:
        """Until `stop`."""
        while not self._stopped:
            now = time.monotonic()
            while self._timers and self._timers[0][0] <= now:
                callback = heapq.heappop(self._timers)[2]
                if callback is not None:
                    callback()
                    if self._stopped:
                        return
            wait = None
            if self._timers:
                wait = max(0.0, self._timers[0][0] - time.monotonic())
            for key, mask in self.selector.select(wait):
                # an earlier callback of this batch may have closed the socket, or another may
                # have taken over its number
                if self.selector.get_map().get(key.fd) is key:
                    key.data(mask)
                if self._stopped:
                    return

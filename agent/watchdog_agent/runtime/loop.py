"""Event loop: one thread, one poll, a heap of timers. Long operations are split into events, so that a
hanging device cannot delay signals or the health check."""

from __future__ import annotations

import os
import select
import time

from watchdog_agent.runtime.stdlib_light import heapq, signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from watchdog_agent.runtime.types import Timer, Watched


def between(low: float, high: float) -> float:
    """A random number from low to high, for jitter. The random module would need 0.25 MB."""
    return low + (high - low) * int.from_bytes(os.urandom(4), "big") / 0xFFFFFFFF


NOTHING, READ, WRITE = 0, 1, 2
FEW = 64
"""Number of timers below which cancelled ones are not removed."""
_EVENTS = {
    NOTHING: 0,
    READ: select.POLLIN,
    WRITE: select.POLLOUT,
    3: select.POLLIN | select.POLLOUT,
}


class Loop:
    """Runs callbacks until `stop`. Signals wake it through a pipe."""

    def __init__(self) -> None:
        # The selectors module would need 0.7 MB; few descriptors are watched at a time.
        self._poll = select.poll()
        self._watched: dict[int, tuple[Watched | None, int, Callable[[int], None]]] = {}
        self._timers: list[Timer] = []
        self._room = FEW
        self._sequence = 0
        self._stopped = False
        self._on_signal: Callable[[int], None] | None = None
        self._read, self._write = os.pipe()
        for fd in (self._read, self._write):
            os.set_blocking(fd, False)
        self._register(self._read, None, READ, self._signalled)

    def _register(
        self, fd: int, sock: Watched | None, events: int, callback: Callable[[int], None]
    ) -> None:
        self._poll.register(fd, _EVENTS[events])  # or modifies the registration
        self._watched[fd] = (sock, events, callback)

    def on_signals(self, numbers: Iterable[int], callback: Callable[[int], None]) -> None:
        """Call back with the number of each of these signals."""
        self._on_signal = callback
        for number in numbers:
            signal.signal(number, lambda _number, _frame: None)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)

    def _signalled(self, _mask: int) -> None:
        for number in os.read(self._read, 64):
            if self._on_signal is not None:
                self._on_signal(number)

    def later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        """Call back after delay_s; return a list whose [2] may be set to None to cancel the timer."""
        self._sequence += 1
        timer: Timer = [time.monotonic() + delay_s, self._sequence, callback]
        heapq.heappush(self._timers, timer)
        if len(self._timers) > self._room:
            # Cancelled timers would stay until they are due. Doubling the limit keeps removal cheap.
            self._timers = [one for one in self._timers if one[2] is not None]
            heapq.heapify(self._timers)
            self._room = max(FEW, 2 * len(self._timers))
        return timer

    def watch(self, sock: Watched, events: int, callback: Callable[[int], None]) -> None:
        """Call back with the ready events of `sock`; a second call changes what is watched."""
        self._register(sock.fileno(), sock, events, callback)

    def forget(self, sock: Watched) -> None:
        """Stop watching `sock` and close it."""
        fd = sock.fileno()
        if fd < 0:
            # Closed or wrapped elsewhere.
            fd = next((n for n, one in self._watched.items() if one[0] is sock), -1)
        if self._watched.pop(fd, None) is not None:
            self._poll.unregister(fd)
        sock.close()

    def close(self) -> None:
        """Close the signal pipe."""
        self._watched.clear()
        os.close(self._read)
        os.close(self._write)

    def stop(self) -> None:
        """Return from `run` after the current callback."""
        self._stopped = True

    def run(self) -> None:
        """Run until `stop`."""
        while not self._stopped:
            now = time.monotonic()
            # Cancelled timers must not wake the loop either.
            while self._timers and (self._timers[0][0] <= now or self._timers[0][2] is None):
                callback = heapq.heappop(self._timers)[2]
                if callback is not None:
                    callback()
                    if self._stopped:
                        return
            self._dispatch()

    def _dispatch(self) -> None:
        """Wait until a descriptor is ready or a timer is due, and run the callbacks of ready descriptors."""
        wait_ms = None
        if self._timers:
            # Rounded up, so that the timer is due when poll returns.
            wait_ms = max(0.0, self._timers[0][0] - time.monotonic()) * 1000 + 0.999
        found = self._poll.poll(wait_ms)
        for fd, watched, happened in [(fd, self._watched.get(fd), how) for fd, how in found]:
            # An earlier callback of this batch may have closed the socket, or another one may have reused its
            # descriptor.
            if watched is None or watched is not self._watched.get(fd):
                continue
            if happened & select.POLLNVAL:
                # Closed without `forget`: poll would report it again and again.
                del self._watched[fd]
                self._poll.unregister(fd)
                continue
            # An error or a hang-up counts as both, so that a waiting callback is run.
            mask = watched[1]
            if not happened & ~select.POLLOUT:
                mask &= WRITE
            if not happened & ~select.POLLIN:
                mask &= READ
            if mask:
                watched[2](mask)
            if self._stopped:
                return

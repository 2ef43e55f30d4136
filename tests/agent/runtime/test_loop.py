"""The agent's event loop."""

from __future__ import annotations

import socket

from watchdog_agent.runtime.loop import FEW, Loop


def test_a_socket_closed_in_the_same_batch_is_left_alone() -> None:
    """When one callback closes the socket of another that is ready too, the loop continues."""
    loop = Loop()
    pairs = [socket.socketpair() for _ in range(2)]
    called = []

    def first_come(which: int) -> None:
        called.append(which)
        loop.forget(pairs[1 - which][0])
        loop.later(0.02, loop.stop)

    for which, (near, far) in enumerate(pairs):
        far.send(b"x")
        loop.watch(near, 1, lambda _mask, which=which: called or first_come(which))
    try:
        loop.run()
    finally:
        for pair in pairs:
            for one in pair:
                one.close()
        loop.close()
    assert len(called) == 1


def test_cancelled_timers_are_not_called() -> None:
    """A cancelled timer does nothing; the others fire in order."""
    loop = Loop()
    called = []
    gone = loop.later(0.0, lambda: called.append("gone"))
    gone[2] = None
    loop.later(0.02, loop.stop)
    loop.later(0.01, lambda: called.append("b"))
    loop.later(0.0, lambda: called.append("a"))
    loop.run()
    loop.close()
    assert called == ["a", "b"]


def test_cancelled_timers_take_no_room() -> None:
    """Of ten thousand timers cancelled long before they are due, a few dozen are kept; the others all fire in order,
    including ones set from a timer."""
    loop = Loop()
    called: list[int] = []
    for number in range(FEW):
        loop.later(0.001 * number, lambda number=number: called.append(number))

    def churn() -> None:
        for _ in range(10_000):
            loop.later(3600.0, loop.stop)[2] = None

    loop.later(0.0005, churn)
    loop.later(0.2, loop.stop)
    churn()
    most = len(loop._timers)
    loop.run()
    left = len(loop._timers)
    loop.close()
    assert called == list(range(FEW))
    assert most <= 2 * (FEW + 2) + 1
    assert left <= 2 * (FEW + 2) + 1

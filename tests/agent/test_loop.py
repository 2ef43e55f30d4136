"""The loop under the agent."""

from __future__ import annotations

import socket

from watchdog_agent.loop import Loop


def test_a_socket_closed_in_the_same_batch_is_left_alone() -> None:
    """When one callback closes the socket of another that is ready too, the loop goes on."""
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
    """A timer whose callback was taken away does nothing; the others come in order."""
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

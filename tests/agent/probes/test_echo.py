"""The echo of a confirmation: one lost packet is not a dead device."""

from __future__ import annotations

import socket
import threading

import pytest
from watchdog_agent.probes.builtin import _Echo
from watchdog_agent.runtime.loop import Loop

END = b"no more requests"


def peer(sock: socket.socket, answer_at: int, seen: list[bytes]) -> None:
    """Take echo requests until END comes; answer that of number answer_at alone."""
    while True:
        packet, where = sock.recvfrom(2048)
        if packet == END:
            return
        seen.append(packet)
        if len(seen) == answer_at:
            sock.sendto(b"\0" + packet[1:], where)


@pytest.mark.parametrize(("answer_at", "alive"), [(1, True), (3, True), (4, False)])
def test_an_echo_is_asked_three_times_within_its_timeout(answer_at: int, alive: bool) -> None:
    """An answer to any of the three packets is life, the first one ends the asking, and without one the
    device is silent after the timeout, of which the configured length is reported. The packets go over UDP here, whose loss the test decides."""
    seen: list[bytes] = []
    ended: list[tuple[bool, str]] = []
    loop = Loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=peer, args=(other, answer_at, seen))
        thread.start()
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

        def done(ok: bool, reason: str) -> None:
            ended.append((ok, reason))
            loop.stop()

        # the third packet has a third of the time for its answer: a second also where the machine is busy
        timeout_s = 3.0 if alive else 0.9
        _Echo(loop, sock, other.getsockname(), timeout_s, done, raw=False, within_s=1.0)
        loop.run()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(END, other.getsockname())
        thread.join()
    loop.close()

    assert ended == [(True, "echo") if alive else (False, "no echo within 1 s")]
    assert len(seen) == min(answer_at, 3)
    assert len(set(seen)) == 1

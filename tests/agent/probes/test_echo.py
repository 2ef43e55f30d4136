"""The echo of a confirmation: one lost packet does not mean a dead device."""

from __future__ import annotations

import socket
import threading

import pytest
from watchdog_agent.probes.builtin import _Echo
from watchdog_agent.runtime.loop import Loop

END = b"no more requests"


def peer(sock: socket.socket, answer_at: int, seen: list[bytes]) -> None:
    """Receive echo requests until END arrives; answer only request number answer_at."""
    while True:
        packet, where = sock.recvfrom(2048)
        if packet == END:
            return
        seen.append(packet)
        if len(seen) == answer_at:
            sock.sendto(b"\0" + packet[1:], where)


@pytest.mark.parametrize(("answer_at", "alive"), [(1, True), (3, True), (4, False)])
def test_an_echo_is_asked_three_times_within_its_timeout(answer_at: int, alive: bool) -> None:
    """An answer to any of the three packets is a success, and the first one ends the probe. Without one the probe fails
    after the timeout, and the reason states its configured length. The packets go over UDP here, so that the test
    decides which are lost."""
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

        # the third packet has a third of the time for its answer: a second even on a busy machine
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

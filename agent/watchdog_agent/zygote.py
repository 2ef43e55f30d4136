"""A parent that has imported the agent once and forks it: what is never written stays shared by all.

`run(FD)`, in a Python of its own, serves a Unix socket of sequential packets, one request and one
answer at a time, both JSON. Standard library only; it ends when the other side of the socket is gone,
and its agents go on. Requests::

    {"do": "start", "env": {...}, "name": "..."} with descriptors [log, lock]  -> {"pid": n}
    {"do": "ended", "pid": n}   -> {"code": n or null}   -n = signal n; null = it runs, or is not ours
    {"do": "bury", "pid": n}    -> {}                    reap a dead one

An agent that was started so has the null device as its input, `log` as its output, `lock` as descriptor
3, the given environment alone, a session of its own, and every signal as a new process has it.
"""

from __future__ import annotations

import gc
import os

from watchdog_agent import main, zygote_warmup
from watchdog_agent.runtime.stdlib_light import json, signal, socket, struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

MAX_BYTES = 65536
INT = 4
"""Bytes of a descriptor in a message."""
LOCK = 3
"""The descriptor that an agent keeps for its whole life (S3)."""


def serve(channel: socket.socket) -> None:
    """Answer until the other side is gone."""
    while True:
        data, descriptors = receive(channel)
        if not data:
            return
        try:
            answer = _answer(json.loads(data), descriptors)
        except OSError as error:
            answer = {"error": os.strerror(error.errno or 0)}
        finally:
            for one in descriptors:
                os.close(one)
        channel.send(json.dumps(answer).encode())


def receive(channel: socket.socket) -> tuple[bytes, list[int]]:
    """A request and the descriptors that came with it: socket.recv_fds, which the C module has not."""
    room = socket.CMSG_SPACE(2 * INT)
    data, more, _flags, _where = channel.recvmsg(MAX_BYTES, room)
    descriptors: list[int] = []
    for level, kind, raw in more:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors += struct.unpack(f"{len(raw) // INT}i", raw[: len(raw) // INT * INT])
    return data, descriptors


def _answer(request: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
    if request["do"] == "start":
        pid = os.fork()
        if pid == 0:
            _agent(request["env"], request["name"], *descriptors)
        return {"pid": pid}
    if request["do"] == "bury":
        _wait(request["pid"], os.WEXITED | os.WNOHANG)
        return {}
    found = _wait(request["pid"], os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if found is None:
        return {"code": None}
    exited = found.si_code == os.CLD_EXITED
    return {"code": found.si_status if exited else -found.si_status}


def _wait(pid: int, options: int) -> Any:
    try:
        return os.waitid(os.P_PID, pid, options)
    except ChildProcessError:
        return None


def _agent(environment: dict[str, str], name: str, log: int, lock: int) -> NoReturn:
    """Be an agent; never returns into the nursery's code."""
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        # None of these is 0 to 3: the nursery keeps those taken.
        for source, target in ((null, 0), (log, 1), (log, 2), (lock, LOCK)):
            os.dup2(source, target)
        os.closerange(LOCK + 1, max(null, log, lock, *_open()) + 1)
        os.environ.clear()
        os.environ.update(environment)
        _call_it(name)
        main.main()
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 1)
    finally:
        os._exit(70)


def _open() -> list[int]:
    return [int(one) for one in os.listdir("/proc/self/fd")]


def _call_it(name: str) -> None:
    """What `ps -o comm` and `top` show: all agents have the nursery's command line."""
    try:
        with open("/proc/self/comm", "wb", buffering=0) as file:
            file.write(name.encode()[:15])
    except OSError:
        pass


def run(descriptor: int) -> NoReturn:
    """Be a nursery until the other side of this socket is gone."""
    while (spare := os.open(os.devnull, os.O_RDONLY)) <= LOCK:
        pass  # so that no descriptor that comes later is one of 0 to 3
    if descriptor <= LOCK:
        taken, descriptor = descriptor, os.dup(descriptor)
        os.dup2(spare, taken)
    os.close(spare)
    channel = socket.socket(fileno=descriptor)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        zygote_warmup.warm()
    except OSError:
        pass  # it makes agents lighter, not right
    # What lives now is never looked at by the collector of a child, which would copy its pages.
    gc.collect()
    gc.freeze()
    channel.send(b"{}")
    serve(channel)
    os._exit(0)

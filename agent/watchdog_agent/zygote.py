"""Zygote: imports the agent once and forks it. Memory pages that are never written stay shared by all agents.

`run(FD)`, in its own Python process, serves a Unix SOCK_SEQPACKET socket: one request and one
response at a time, both JSON. Standard library only. It exits when the peer closes the socket;
its agents keep running. Requests::

    {"do": "start", "env": {...}, "name": "..."} with descriptors [log, lock]  -> {"pid": n}
    {"do": "ended", "pid": n}   -> {"code": n or null}   -n = signal n; null = running, or not a child
    {"do": "bury", "pid": n}    -> {}                    reap an exited agent

Each agent gets the null device as stdin, `log` as stdout and stderr, `lock` as descriptor 3, only the
given environment, its own session, and the signal handling of a new process.
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
"""Size of a file descriptor in a message, in bytes."""
LOCK = 3
"""The descriptor that an agent keeps open as long as it runs (S3)."""


def serve(channel: socket.socket) -> None:
    """Answer requests until the peer closes the socket."""
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
    """Receive a request and its file descriptors, like socket.recv_fds, which `_socket` does not have."""
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
    """Run the agent in the forked child; never returns to the caller."""
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        # None of these is 0 to 3: the zygote keeps those in use.
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
    """Set the name that `ps -o comm` and `top` show: all agents share the zygote's command line."""
    try:
        with open("/proc/self/comm", "wb", buffering=0) as file:
            file.write(name.encode()[:15])
    except OSError:
        pass


def run(descriptor: int) -> NoReturn:
    """Run the zygote until the peer closes the socket."""
    while (spare := os.open(os.devnull, os.O_RDONLY)) <= LOCK:
        pass  # so that no later descriptor is 0 to 3
    if descriptor <= LOCK:
        taken, descriptor = descriptor, os.dup(descriptor)
        os.dup2(spare, taken)
    os.close(spare)
    channel = socket.socket(fileno=descriptor)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        zygote_warmup.warm()
    except OSError:
        pass  # optional: it only reduces the memory of agents
    # Exclude existing objects from garbage collection in the children, which would copy their pages.
    gc.collect()
    gc.freeze()
    channel.send(b"{}")
    serve(channel)
    os._exit(0)

"""Memory of one agent, and its time from start to ready, compared with bare Python.

The agent is the single-file one, as under Nomad: two probes, registered in a stand-in for Consul, reporting
to a stand-in for the API; this process is both. Every figure is the median of several runs.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from bench.rows import Row
from nomad_watchdog.ids import parse_device_id, slug_of
from nomad_watchdog.schedulers.agent_zipapp import build_agent

RUNS = 7
AGENTS = 50
SETTLE_S = 1.0
BARE = [sys.executable, "-I", "-S", "-c"]
IDLE = "import sys; sys.stdout.write('x'); sys.stdout.flush(); sys.stdin.read()"


class Stub(http.server.ThreadingHTTPServer):
    """Device, API and Consul in one: answers 200 to all requests, and records which agents reported ready."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.ready_at: dict[str, float] = {}
        self.changed = threading.Condition()

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore errors: a refused probe closes its connection."""

    def wait_for(self, instances: set[str], timeout_s: float) -> None:
        with self.changed:
            done = self.changed.wait_for(lambda: instances <= self.ready_at.keys(), timeout_s)
        if not done:
            raise TimeoutError(f"{len(instances - self.ready_at.keys())} agents are not ready")


class _Answer(http.server.BaseHTTPRequestHandler):
    server: Stub

    def do_GET(self) -> None:
        self._ok()

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._ok()

    def do_POST(self) -> None:
        now = time.perf_counter()
        report = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._ok()
        if report.get("ready"):  # log lines and alerts are sent here too (bench/weight.py)
            with self.server.changed:
                self.server.ready_at.setdefault(report["instance"], now)
                self.server.changed.notify_all()

    def _ok(self) -> None:
        with contextlib.suppress(ConnectionError):
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def log_message(self, *_args: object) -> None:
        pass


@contextlib.contextmanager
def stub() -> Iterator[Stub]:
    server = Stub()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def start(argv: list[str], place: Stub, instance: str) -> subprocess.Popen[bytes]:
    """Start one agent, without a state directory."""
    port = place.server_address[1]
    here = f"http://127.0.0.1:{port}"
    device = parse_device_id(f"device-{instance}")
    config = {
        "v": 1,
        "device_id": device,
        "slug": slug_of(device),
        "epoch": 1,
        "address": "127.0.0.1",
        "api": [here],
        "consul": here,
        "probes": [{"kind": "http", "port": port}, {"kind": "tcp", "port": port}],
        "confirm": [{"kind": "icmp"}],
    }
    env = {
        "PATH": os.environ.get("PATH", os.defpath),
        "WATCHDOG_INSTANCE": instance,
        "WATCHDOG_CONFIG": "/proc/self/fd/0",
    }
    document = _document(config)
    try:
        return subprocess.Popen(
            argv, stdin=document, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env
        )
    finally:
        os.close(document)


def _document(config: dict[str, object]) -> int:
    fd = os.memfd_create("config")
    os.write(fd, json.dumps(config).encode())
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


@contextlib.contextmanager
def agents(argv: list[str], place: Stub, names: list[str]) -> Iterator[list[int]]:
    """Start agents; yield their PIDs when all are ready, and stop them at the end."""
    running: list[subprocess.Popen[bytes]] = []
    try:
        running.extend(start(argv, place, name) for name in names)
        place.wait_for(set(names), 60.0)
        yield [one.pid for one in running]
    finally:
        _stop(running)


def _stop(running: list[subprocess.Popen[bytes]]) -> None:
    for one in running:
        one.terminate()
    for one in running:
        try:
            one.wait(10)
        except subprocess.TimeoutExpired:
            one.kill()
            one.wait()


def megabytes(pid: int, file: str, *fields: str) -> float:
    """The sum of fields (kB) of a file in /proc/<pid>, in MB of 1,000,000 bytes."""
    total = 0
    for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in fields:
            total += int(rest.split()[0])
    return total * 1024 / 1e6


def bare_rss() -> float:
    """Resident memory of an idle Python, in MB."""
    with subprocess.Popen([*BARE, IDLE], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        figure = megabytes(process.pid, "status", "VmRSS")
        process.communicate(timeout=10)
    return figure


def bare_start_ms() -> float:
    """Milliseconds until the first statement of a bare Python takes effect here."""
    began = time.perf_counter()
    with subprocess.Popen([*BARE, IDLE], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        took = time.perf_counter() - began
        process.communicate(timeout=10)
    return took * 1e3


def one_agent(argv: list[str], place: Stub, instance: str) -> tuple[float, float]:
    """(ms from start to the first ready report, MB resident after SETTLE_S)."""
    began = time.perf_counter()
    with agents(argv, place, [instance]) as (pid,):
        took = (place.ready_at[instance] - began) * 1e3
        time.sleep(SETTLE_S)  # lets it settle; there is no event to wait for
        return took, megabytes(pid, "status", "VmRSS")


def measure_one(argv: list[str], place: Stub, runs: int = RUNS) -> dict[str, float]:
    """Medians of bare Python and of the agent, run alternately."""
    figures: dict[str, list[float]] = {"bare_ms": [], "bare_mb": [], "ms": [], "mb": []}
    for number in range(runs):
        figures["bare_ms"].append(bare_start_ms())
        figures["bare_mb"].append(bare_rss())
        took, resident = one_agent(argv, place, f"one-{number}-{time.monotonic_ns()}")
        figures["ms"].append(took)
        figures["mb"].append(resident)
    return {name: statistics.median(values) for name, values in figures.items()}


def many(argv: list[str], place: Stub) -> tuple[float, float]:
    """(private MB, proportional MB) of one of AGENTS agents."""
    with agents(argv, place, [f"many-{n}" for n in range(AGENTS)]) as pids:
        time.sleep(SETTLE_S)  # as above
        private = [megabytes(p, "smaps_rollup", "Private_Clean", "Private_Dirty") for p in pids]
        shared = [megabytes(p, "smaps_rollup", "Pss") for p in pids]
    return statistics.median(private), statistics.median(shared)


def node_exporter() -> list[Row]:
    """Debian's node exporter, a small agent that most nodes already run."""
    name = "prometheus-node-exporter RSS"
    program = shutil.which("prometheus-node-exporter")
    if program is None:
        hint = "not installed: apt-get install prometheus-node-exporter"
        return [Row(name, float("nan"), "MB", note=hint)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    process = subprocess.Popen(
        [program, f"--web.listen-address={address}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _until_listening(address, process)
        time.sleep(SETTLE_S)  # as above
        idle = megabytes(process.pid, "status", "VmRSS")
        for _ in range(5):
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
                answer.read()
        after = megabytes(process.pid, "status", "VmRSS")
    finally:
        _stop([process])
    return [Row(f"{name}, idle", idle, "MB"), Row(f"{name}, after 5 scrapes", after, "MB")]


def _until_listening(address: str, process: subprocess.Popen[bytes]) -> None:
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + 15
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
            return
        time.sleep(0.02)  # polls with a deadline
    raise TimeoutError(f"nothing listens on {address}")


def run() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder, stub() as place:
        path = Path(folder) / "agent.pyz"
        build_agent(path)
        argv = [sys.executable, "-I", "-S", str(path)]
        one = measure_one(argv, place)
        private, proportional = many(argv, place)
    above = one["ms"] - one["bare_ms"]
    return [
        Row("bare CPython RSS", one["bare_mb"], "MB", note="python -I -S, idle"),
        Row(
            "agent RSS",
            one["mb"],
            "MB",
            floor="≤ 16",
            aim="≤ 12",
            note=f"two probes, registered, reporting; {one['mb'] / one['bare_mb']:.2f} × bare",
        ),
        Row("bare CPython start", one["bare_ms"], "ms"),
        Row(
            "agent start → ready, above bare CPython",
            above,
            "ms",
            floor="≤ 150",
            aim="≤ 40",
            note=f"{one['ms']:.1f} ms in all: probed, registered, first report in the API's hands",
        ),
        Row(
            f"agent private memory, of {AGENTS}",
            private,
            "MB",
            note="Private_Clean + Private_Dirty",
        ),
        Row(f"agent PSS, of {AGENTS}", proportional, "MB"),
        *node_exporter(),
    ]


if __name__ == "__main__":
    from bench.rows import table

    print(table(run()))

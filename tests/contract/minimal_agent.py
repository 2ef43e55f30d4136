"""An agent written from docs/agent-contract.md alone, without watchdog_agent."""

import json
import os
import signal
import socket
import sys
import threading
import urllib.error
import urllib.request

with open(os.environ["WATCHDOG_CONFIG"], encoding="utf-8") as file:
    config = json.load(file)
stopping = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stopping.set())
host, _, port = os.environ.get("WATCHDOG_LISTEN", "127.0.0.1:0").rpartition(":")
pages = socket.create_server((host, int(port)))
listen = f"{host}:{pages.getsockname()[1]}"
answered = misses = sequence = 0


def serve() -> None:
    while True:
        sock, _ = pages.accept()
        with sock:
            path = sock.recv(4096).split(b" ")[1]
            status = b"404 Not Found" if path not in (b"/healthz", b"/ready") else b"200 OK"
            sock.sendall(b"HTTP/1.1 " + status + b"\r\nContent-Length: 3\r\n\r\nok\n")


def probe() -> None:
    global answered, misses
    try:
        where = (config["address"], config["probes"][0]["port"])
        socket.create_connection(where, config["probes"][0].get("timeout_s", 2)).close()
        answered, misses = 1, 0
    except OSError:
        misses += 1


def report(last: bool) -> None:
    global sequence
    sequence += 1
    said = {
        "v": 1,
        "device_id": config["device_id"],
        "epoch": config["epoch"],
        "instance": os.environ["WATCHDOG_INSTANCE"],
        "sequence": sequence,
        "ready": not last,
        "state": "suspect" if misses >= config["probes"][0].get("misses", 3) else "ok",
        "was_ready": bool(answered),
        "misses": misses,
        "confirmed": False,
        "listen": listen,
        "stopping": last,
        "of_a_later_version": {"ignored": True},
    }
    url = f"{config['api'][0]}/v1/agents/report"
    headers = {"Content-Type": "application/json"}
    if config.get("credential"):
        headers["Authorization"] = f"Bearer {config['credential']}"
    request = urllib.request.Request(url, json.dumps(said).encode(), headers)
    try:
        urllib.request.urlopen(request, timeout=3).close()
    except urllib.error.HTTPError as error:
        if error.code == 410:
            sys.exit(0)
    except OSError:
        pass  # later


threading.Thread(target=serve, daemon=True).start()
while not stopping.wait(min(0.3, config["beat_s"])):
    probe()
    report(last=False)
report(last=True)
os._exit(128 + signal.SIGTERM)

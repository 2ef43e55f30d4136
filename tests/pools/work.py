"""The work for the pools of these tests: numbers on a real queue, each to be done once."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nats
from nats.js.api import RetentionPolicy

from servers.nats import NatsServer

WORKER = Path(__file__).with_name("nats_worker.py")
WORK_S = 0.25
MESSAGES = 120
LEAST, MOST = 1, 5
DEPTH = "account_details[0].stream_detail[name=JOBS].state.messages"
"""Path of the number of waiting messages in NATS's page `/jsz?streams=true`."""

CONFIG = """
backend  = "%(backend)s"
data_dir = "{root}/data"

api {
  listen = "127.0.0.1:{port}"
}

registry {
  kind = "sqlite"
}

%(block)s

agent_class "default" {
  probe "tcp" {
    port = 9
  }
}

agent_pool "encoder" {
  %(worker)s
  scaler        = "%(scaler)s"
  min           = %(least)d
  max           = %(most)d
  cpu           = 50
  kill_timeout  = "10s"
  interval      = "500ms"
  cooldown_up   = "1s"
  cooldown_down = "1s"
  settle        = "3s"
  step_up       = 2
  step_down     = 2

  %(metric)s
}
"""


def config(
    backend: str, worker: str, metric: str, block: str = "", *, scaler: str = "builtin"
) -> str:
    """Configuration of a program with one pool. `worker`, `metric`: lines of its block; `block`: the backend's own."""
    words = {"backend": backend, "worker": worker, "metric": metric, "block": block}
    return CONFIG % {**words, "scaler": scaler, "least": LEAST, "most": MOST}


def process(queue: NatsServer, folder: Path) -> str:
    """The worker as a command. It records its work in `folder`, which is created."""
    folder.mkdir()
    command = [sys.executable, str(WORKER), *arguments(queue, folder)]
    return f"command = {json.dumps(command)}"


def arguments(queue: NatsServer, folder: Path) -> list[str]:
    return [queue.url, str(WORK_S), str(folder)]


async def make(queue: NatsServer) -> None:
    """Create the work queue JOBS, which removes acknowledged messages."""
    client = await nats.connect(queue.url)
    stream = client.jetstream()
    await stream.add_stream(name="JOBS", subjects=["jobs"], retention=RetentionPolicy.WORK_QUEUE)
    await stream.add_consumer("JOBS", durable_name="workers", ack_policy="explicit")
    await client.close()


async def publish(queue: NatsServer, numbers: Sequence[int]) -> None:
    client = await nats.connect(queue.url)
    for number in numbers:
        await client.jetstream().publish("jobs", str(number).encode())
    await client.close()


async def waiting(queue: NatsServer) -> int:
    """Number of messages that are not done yet."""
    client = await nats.connect(queue.url)
    info = await client.jetstream().stream_info("JOBS")
    await client.close()
    return info.state.messages


def done(folder: Path) -> Counter[int]:
    """Message → number of times it was done."""
    lines = [line for file in folder.glob("*.done") for line in file.read_text().splitlines()]
    return Counter(map(int, lines))


def all_done_once(folder: Path) -> None:
    """By more than one worker, and none twice: a stopped worker finished its current message first."""
    found = done(folder)
    assert sorted(found) == list(range(MESSAGES))
    assert max(found.values()) == 1
    assert len(list(folder.glob("*.done"))) > 1


def counts(row: dict[str, Any]) -> tuple[int, int]:
    return row["count"], row["running"]
